package guest

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// maxKernelConfig is the largest that is taken for one, in bytes; they have a
// third of a megabyte.
const maxKernelConfig = 4 << 20

// kernelConfig finds the file that a kernel was configured with, as packages of
// distributions have it: config-RELEASE beside vmlinuz, or config among the
// modules. It returns nil if there is none.
func kernelConfig(cfg *Config) ([]byte, error) {
	k := cfg.Kernel
	if k.Release == "" || k.Release != filepath.Base(k.Release) {
		return nil, nil
	}
	places := []string{filepath.Join(filepath.Dir(k.Path), "config-"+k.Release)}
	if cfg.Modules != nil {
		places = append(places, filepath.Join(cfg.Modules.Dir(), "config"))
	}
	for _, path := range places {
		if st, err := os.Stat(path); err != nil || !st.Mode().IsRegular() || st.Size() > maxKernelConfig {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			continue // not for everybody to read, as some have it
		}
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, maxKernelConfig))
		if err != nil {
			return nil, fmt.Errorf("the kernel's configuration %s: %w", path, err)
		}
		return b, nil
	}
	return nil, nil
}
