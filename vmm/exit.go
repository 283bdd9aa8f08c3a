package vmm

import "fmt"

// ExitReason says why a machine stopped.
type ExitReason int

const (
	// Failed: the machine could not go on; the error says why.
	Failed ExitReason = iota
	// PowerOff: the guest switched the machine off (ACPI S5).
	PowerOff
	// Reset: the guest asked for a reset (ACPI reset register, keyboard
	// controller, port 0xcf9) or died of a triple fault.
	Reset
	// Panic: the guest's kernel panicked and said so through its pvpanic
	// device. A guest without that driver resets (panic=-1) or hangs.
	Panic
	// Stopped: the context of Run ended or the machine was closed.
	Stopped
)

func (r ExitReason) String() string {
	switch r {
	case Failed:
		return "failed"
	case PowerOff:
		return "power-off"
	case Reset:
		return "reset"
	case Panic:
		return "panic"
	case Stopped:
		return "stopped"
	}
	return fmt.Sprintf("ExitReason(%d)", int(r))
}
