package kvm

import (
	"errors"
	"fmt"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/host"
)

// APIVersion is the only version of the KVM interface there ever was.
const APIVersion = 12

// ErrNotKVM is returned by Open for a file that is not a KVM device.
var ErrNotKVM = errors.New("not a KVM device")

// System is an open KVM device.
type System struct {
	fd       int
	path     string
	mmapSize int
}

// Open opens the KVM device at path. The error wraps fs.ErrNotExist,
// fs.ErrPermission, ErrNotKVM or, where this package's KVM cannot be,
// errors.ErrUnsupported.
func Open(path string) (*System, error) {
	if err := host.Supported(); err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	s := &System{fd: fd, path: path}
	v, err := ioctlInt(fd, kvmGetAPIVersion, 0)
	if err != nil || v != APIVersion {
		s.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w (%v)", path, ErrNotKVM, err)
		}
		return nil, fmt.Errorf("%s: %w of API version %d (it has %d)", path, ErrNotKVM, APIVersion, v)
	}
	n, err := ioctlInt(fd, kvmGetVCPUMmapSize, 0)
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("%s: KVM_GET_VCPU_MMAP_SIZE: %w", path, err)
	}
	s.mmapSize = int(n)
	return s, nil
}

// Close releases the device. It is idempotent.
func (s *System) Close() error { return closeFD(&s.fd) }

func closeFD(fd *int) error {
	if *fd < 0 {
		return nil
	}
	err := unix.Close(*fd)
	*fd = -1
	return err
}

// CheckExtension is KVM_CHECK_EXTENSION: 0 means no, other values depend on
// the capability.
func (s *System) CheckExtension(c Capability) int {
	n, err := ioctlInt(s.fd, kvmCheckExtension, uintptr(c))
	if err != nil {
		return 0
	}
	return int(n)
}

// SupportedCPUID is KVM_GET_SUPPORTED_CPUID: what this host's KVM can give a
// guest.
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	t := &cpuidTable{nent: maxCPUIDEntries}
	// The request is encoded with the size of the head, without the entries.
	if err := ioctlPtr(s.fd, gokvm.IIOWR(nrGetSupportedCPUID, 8), t); err != nil {
		return nil, fmt.Errorf("KVM_GET_SUPPORTED_CPUID: %w", err)
	}
	return append([]CPUIDEntry(nil), t.entries[:t.nent]...), nil
}

// CreateVM makes a virtual machine.
func (s *System) CreateVM() (*VM, error) {
	fd, err := ioctlInt(s.fd, kvmCreateVM, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: KVM_CREATE_VM: %w", s.path, err)
	}
	unix.CloseOnExec(int(fd))
	return &VM{fd: int(fd), mmapSize: s.mmapSize}, nil
}
