package host

import (
	"errors"
	"fmt"
	"runtime"
)

// Supported says whether this program was built for a system that can run
// guests, on its KVM or in the sandbox. The error wraps errors.ErrUnsupported.
func Supported() error { return supported(runtime.GOOS, runtime.GOARCH) }

func supported(goos, goarch string) error {
	if goos == "linux" && goarch == "amd64" {
		return nil
	}
	return fmt.Errorf("a virtual machine needs Linux on x86-64, and this program was built for %s/%s: %w", goos, goarch, errors.ErrUnsupported)
}
