package pci

import "github.com/moovm/moovm/virtio"

// Host is what a Function asks of the machine it is plugged into. Its methods
// may be called from any goroutine, also while the machine calls the Function.
type Host interface {
	// NewMSI allocates a message-signalled interrupt, not yet programmed.
	NewMSI() (MSI, error)
	// BindDoorbell makes a guest write of any width at the guest-physical
	// address addr signal ev without calling the Function
	// (KVM_IOEVENTFD with length 0). On an error the Function falls back
	// to writes that arrive through WriteMem.
	BindDoorbell(addr uint64, ev *virtio.Event) error
	// UnbindDoorbell undoes BindDoorbell with the same arguments.
	UnbindDoorbell(addr uint64, ev *virtio.Event) error
	// SetINTx sets the level of this function's legacy interrupt line.
	SetINTx(level bool)
}

// MSI is one message-signalled interrupt of the machine. The Function calls
// its methods one at a time.
type MSI interface {
	// Program sets the message: where the interrupt is sent and its data.
	Program(addr uint64, data uint32) error
	// Signal sends the message (a write to an irqfd). Never called before
	// Program.
	Signal() error
	// Close releases the interrupt.
	Close() error
}
