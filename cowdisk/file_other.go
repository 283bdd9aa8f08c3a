//go:build !linux

package cowdisk

import (
	"errors"
	"fmt"
)

var errHost = fmt.Errorf("image files are opened on Linux only; elsewhere pass an FS of your own in the options: %w", errors.ErrUnsupported)

// HostFS exists on Linux only; elsewhere pass an FS of your own in the options.
type HostFS struct{}

func (HostFS) Open(path string, m OpenMode) (File, error) { return nil, errHost }
func (HostFS) OpenBeneath(root, rel string, m OpenMode) (File, error) {
	return nil, errHost
}
func (HostFS) LookBeneath(root, rel string) (string, bool, error) { return "", false, errHost }
func (HostFS) Create(path string) (NewFile, error)                { return nil, errHost }
func (HostFS) Resolve(path string) (string, error)                { return "", errHost }
