package fence

import (
	"errors"
	"syscall"

	"github.com/hugelgupf/p9/linux"
)

// exact makes an error of the system the protocol's error of the same number.
func exact(err error) error {
	if err == nil {
		return nil
	}
	var errno syscall.Errno
	if errors.As(err, &errno) && errno != 0 {
		return linux.Errno(errno)
	}
	return err
}
