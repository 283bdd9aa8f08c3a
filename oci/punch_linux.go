package oci

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// punch gives back what is not needed of a file, where its file system can.
func punch(f *os.File) func(off, n int64) error {
	return func(off, n int64) error {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
			return nil
		}
		return err
	}
}
