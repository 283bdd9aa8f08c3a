package mmio

import (
	"fmt"

	"github.com/moovm/moovm/virtio"
)

// State is the state of a suspended Device: plain data.
type State struct {
	Core                           virtio.CoreState
	DeviceSel, DriverSel, QueueSel uint32
	Interrupts                     uint32
}

// State returns the state of a Device whose Core is suspended.
func (d *Device) State() (State, error) {
	core, err := d.core.State()
	if err != nil {
		return State{}, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return State{Core: core, DeviceSel: d.deviceSel, DriverSel: d.driverSel, QueueSel: d.queueSel, Interrupts: d.interrupts}, nil
}

// SetState puts a state into a Device that is fresh or suspended; it is
// suspended afterwards. Resume lets it go on.
func (d *Device) SetState(s State) error {
	if s.Interrupts&^(intQueue|intConfig) != 0 {
		return fmt.Errorf("%w: interrupt status %#x cannot be", virtio.ErrState, s.Interrupts)
	}
	if err := d.core.SetState(s.Core); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.deviceSel, d.driverSel, d.queueSel, d.interrupts = s.DeviceSel, s.DriverSel, s.QueueSel, s.Interrupts
	d.host.SetInterrupt(d.interrupts != 0)
	return nil
}

// Resume lets a suspended device go on. After SetState, again says that
// interrupts may have been lost, and raises them once.
func (d *Device) Resume(again bool) {
	d.core.Resume()
	if again && d.core.Status()&virtio.StatusDriverOK != 0 {
		d.interrupt(intQueue | intConfig)
	}
}
