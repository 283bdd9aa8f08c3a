//go:build !linux

package agent

import (
	"errors"
	"io"
)

// Serve needs Linux.
func Serve(io.Reader, io.Writer, Hooks) error { return errors.ErrUnsupported }
