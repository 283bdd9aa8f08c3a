//go:build !linux

package virtioblk

import (
	"errors"
	"fmt"
)

// File is a Backend on a raw image file. It needs Linux.
type File struct{ Backend }

// OpenFile returns errors.ErrUnsupported.
func OpenFile(path string, readOnly bool) (*File, error) {
	return nil, fmt.Errorf("virtioblk: raw image files are opened on Linux only; elsewhere give a Backend of your own for %s: %w", path, errors.ErrUnsupported)
}

// These are of use on Linux only, where OpenFile makes a File.

func (*File) UpdateSize() error                        { return errors.ErrUnsupported }
func (*File) Close() error                             { return nil }
func (*File) ReadvAt([][]byte, int64) (int, error)     { return 0, errors.ErrUnsupported }
func (*File) WritevAt([][]byte, int64) (int, error)    { return 0, errors.ErrUnsupported }
func (*File) Discard(off, n int64) error               { return errors.ErrUnsupported }
func (*File) WriteZeroes(off, n int64, may bool) error { return errors.ErrUnsupported }
