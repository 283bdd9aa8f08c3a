package pci

import (
	"log/slog"

	"github.com/moovm/moovm/virtio"
)

// Options are the choices a machine has for a Function; the zero value is
// good for most.
type Options struct {
	// Class is the 24-bit PCI class code (base class, subclass, interface);
	// 0 means the customary one for the device type.
	Class uint32
	// SubsystemID is the PCI subsystem ID; 0 means 0x40 + device type.
	SubsystemID uint16
	// InterruptPin is the INTx pin, 1 (INTA) to 4; 0 means 1.
	InterruptPin uint8
	// AccessPlatform offers VIRTIO_F_ACCESS_PLATFORM (an IOMMU stands
	// between device and memory).
	AccessPlatform bool
	// Logger receives what is worth knowing about a misbehaving driver;
	// nil discards it.
	Logger *slog.Logger
}

// BAR describes a base address register, so that the machine can place it.
type BAR struct {
	Index int    // 0 to 5; a 64-bit BAR takes the next one too
	Size  uint64 // bytes, a power of two
	Is64  bool
}

// Function is one PCI function with a virtio device behind it. Its methods
// are safe for concurrent use by several vCPUs.
type Function struct{}

// New plugs dev into a new function. The function owns the device's queues
// and interrupts from now on; Close releases them.
func New(dev virtio.Device, mem *virtio.Memory, host Host, o Options) (*Function, error) {
	return &Function{}, nil
}

// ReadConfig reads the PCI configuration space at byte offset off.
func (f *Function) ReadConfig(off uint16, p []byte) {}

// WriteConfig writes the PCI configuration space at byte offset off.
func (f *Function) WriteConfig(off uint16, p []byte) {}

// BARs lists the base address registers.
func (f *Function) BARs() []BAR { return nil }

// ReadMem serves a guest read at a guest-physical address; false means the
// address is in none of the function's enabled BARs.
func (f *Function) ReadMem(addr uint64, p []byte) bool { return false }

// WriteMem serves a guest write at a guest-physical address; false means the
// address is in none of the function's enabled BARs.
func (f *Function) WriteMem(addr uint64, p []byte) bool { return false }

// Reset is a machine reset: the device stops and the configuration space
// returns to its power-on state.
func (f *Function) Reset() {}

// Close stops the device and releases doorbells and interrupts.
func (f *Function) Close() error { return nil }
