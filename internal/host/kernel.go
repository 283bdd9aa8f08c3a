package host

import (
	"errors"
	"os"
	"path/filepath"
)

// ErrNoKernel says that no kernel was named and none is in the cache.
var ErrNoKernel = errors.New("no kernel: name one with --kernel or $MOOVM_KERNEL (Debian: apt-get download linux-image-amd64's package and dpkg -x it; `make setup` does that)")

// Kernels are the kernels to boot when none was named: the list in
// $MOOVM_KERNEL, separated by colons, or the one in the cache. The cached
// kernel's modules lie beside it. There is at least one, or ErrNoKernel.
func Kernels() ([]string, error) {
	if list := filepath.SplitList(os.Getenv("MOOVM_KERNEL")); len(list) > 0 {
		return list, nil
	}
	if k, ok := cachedKernel(); ok {
		return []string{k}, nil
	}
	return nil, ErrNoKernel
}

// Kernel is the first of Kernels.
func Kernel() (string, error) {
	list, err := Kernels()
	if err != nil {
		return "", err
	}
	return list[0], nil
}

// SandboxKernel is the emulated host's: the cached one, which `make setup` chose
// for it, else the guest's own, else Kernel's.
func SandboxKernel(guest string) (string, error) {
	if k, ok := cachedKernel(); ok {
		return k, nil
	}
	if guest != "" {
		return guest, nil
	}
	return Kernel()
}

// cachedKernel is the one that `make setup` keeps.
func cachedKernel() (string, bool) {
	dir, err := CacheDir()
	if err != nil {
		return "", false
	}
	found, _ := filepath.Glob(filepath.Join(dir, "kernel", "current", "boot", "vmlinuz-*"))
	if len(found) == 0 {
		return "", false
	}
	return found[0], true
}
