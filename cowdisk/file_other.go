//go:build !linux

package cowdisk

import "errors"

// HostFS exists on Linux only; elsewhere pass an FS of your own in the options.
type HostFS struct{}

func (HostFS) Open(path string, m OpenMode) (File, error) { return nil, errors.ErrUnsupported }
func (HostFS) OpenBeneath(root, rel string, m OpenMode) (File, error) {
	return nil, errors.ErrUnsupported
}
func (HostFS) Create(path string) (NewFile, error) { return nil, errors.ErrUnsupported }
func (HostFS) Resolve(path string) (string, error) { return "", errors.ErrUnsupported }
