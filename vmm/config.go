package vmm

import (
	"io"
	"log/slog"

	"github.com/moovm/moovm/virtio"
)

// Config describes a machine. The zero value of every field but Kernel is
// usable.
type Config struct {
	// Memory is the guest RAM in bytes, a multiple of 4 KiB; 0 means 256 MiB.
	// It is a memory file touched lazily: what the guest does not use costs
	// nothing.
	Memory int64
	// HugePages takes the memory from the host's pool of 2 MiB pages
	// (vm.nr_hugepages): all of it at once, not lazily.
	HugePages bool
	// CPUs is the number of virtual processors, 1 to MaxCPUs; 0 means 1.
	CPUs int
	// Kernel is what the machine boots.
	Kernel Kernel
	// Initrd is the initial RAM disk (a cpio archive), placed as high below
	// the hole under 4 GiB as it fits. May be empty.
	Initrd []byte
	// Cmdline is the kernel command line. The machine adds nothing to it.
	Cmdline string
	// Devices are the virtio devices, in their order on the bus: Linux names
	// the first block device vda. They serve this machine until it is closed.
	Devices []virtio.Device
	// Transport is how they are attached.
	Transport Transport
	// Console is the first serial port (ttyS0), Control the second (ttyS1).
	Console, Control Serial
	// KVM is the path of the KVM device; empty means /dev/kvm.
	KVM string
	// Logger takes the machine's own messages; nil discards them.
	Logger *slog.Logger
}

// MaxCPUs is the largest number of virtual processors of a machine.
const MaxCPUs = 64

// DefaultKVM is the KVM device of the host.
const DefaultKVM = "/dev/kvm"

// Kernel is a kernel image: an x86-64 ELF file (vmlinux), or a bzImage, which
// unpacks itself in the guest (slower, but it can choose a random address:
// KASLR). It is read while New runs and not kept.
type Kernel struct {
	// Name names the image in error messages, usually its file name.
	Name string
	// Image is the file, Size its length in bytes.
	Image io.ReaderAt
	Size  int64
	// Protocol is how the kernel is entered.
	Protocol Protocol
}

// Protocol is a way to enter a kernel.
type Protocol int

const (
	// ProtocolLinux is Linux's 64-bit boot protocol, for ELF and bzImage.
	ProtocolLinux Protocol = iota
	// ProtocolPVH enters an ELF file in 32-bit mode where its
	// XEN_ELFNOTE_PHYS32_ENTRY note says. Linux (CONFIG_PVH) and other systems
	// have it.
	ProtocolPVH
)

// Serial connects one serial port. A nil In never has input, a nil Out
// discards the output.
//
// In is read by a goroutine which ends when In returns an error. A Read that
// never returns outlives the machine (there is no way to interrupt it): give
// an In whose Read can be ended, such as a pipe or an *os.File with deadlines.
// Input waits until the guest has room for it; nothing is dropped.
//
// Out is written by a goroutine, so a slow Out does not stop the guest before
// a bounded buffer is full. Close waits until what the guest wrote is out,
// with a time limit.
type Serial struct {
	In  io.Reader
	Out io.Writer
}
