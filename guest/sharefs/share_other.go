//go:build !linux

package sharefs

import (
	"errors"
	"fmt"

	"github.com/hugelgupf/p9/p9"
)

// Share is a shared folder. It needs Linux.
type Share struct{}

// New returns errors.ErrUnsupported.
func New(dir string, o Options) (*Share, error) {
	return nil, fmt.Errorf("sharefs: sharing %s needs Linux: %w", dir, errors.ErrUnsupported)
}

// FilesEach is of use on Linux only.
func FilesEach(shares int) int { return 1 }

// Attach implements p9.Attacher.
func (s *Share) Attach() (p9.File, error) { return nil, errors.ErrUnsupported }

// Close releases the folder.
func (s *Share) Close() error { return nil }
