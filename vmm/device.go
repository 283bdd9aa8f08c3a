package vmm

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/pci"
)

// device is a virtio device in its place in the machine, whatever the
// transport.
type device interface {
	Core() *virtio.Core
	// Resume lets a suspended device go on; again says that it has been given
	// a state.
	Resume(again bool)
	// save adds the state of a suspended device to the machine's.
	save(*machineState) error
	// restore takes the state of the machine's i-th device.
	restore(s *machineState, i int) error
	// Close ends the device, and what the machine has for it. It may be
	// called again.
	Close() error
}

// deviceStates is how many devices a state has, of either kind, for a machine
// with this transport.
func (s *machineState) deviceStates(t Transport) (own, other int) {
	if t == TransportMMIO {
		return len(s.Windows), len(s.Functions)
	}
	return len(s.Functions), len(s.Windows)
}

// pciDevice is a function on the bus.
type pciDevice struct{ *pci.Function }

func (d pciDevice) save(s *machineState) error {
	state, err := d.State()
	s.Functions = append(s.Functions, state)
	return err
}

func (d pciDevice) restore(s *machineState, i int) error { return d.SetState(s.Functions[i]) }

// mmioDevice has a window of registers.
type mmioDevice struct {
	*mmio.Device
	host windowHost
}

func (d mmioDevice) save(s *machineState) error {
	state, err := d.State()
	s.Windows = append(s.Windows, state)
	return err
}

func (d mmioDevice) restore(s *machineState, i int) error { return d.SetState(s.Windows[i]) }

func (d mmioDevice) Close() error { return errors.Join(d.Device.Close(), d.host.Close()) }

// createDevices attaches the virtio devices.
func (m *Machine) createDevices() error {
	for i, dev := range m.cfg.Devices {
		if dev == nil {
			return fmt.Errorf("device %d is nil", i)
		}
		plug := m.plugFunction
		if m.cfg.Transport == TransportMMIO {
			plug = m.plugWindow
		}
		if err := plug(dev); err != nil {
			return fmt.Errorf("device %d: %w", i, err)
		}
	}
	return nil
}

// eachDevice calls f for each device until one fails.
func (m *Machine) eachDevice(f func(i int, d device) error) error {
	for i, d := range m.devices {
		if err := f(i, d); err != nil {
			return fmt.Errorf("device %d: %w", i, err)
		}
	}
	return nil
}

// suspendDevices waits for what the devices have begun. After an error those
// that it has suspended wait for resumeDevices.
func (m *Machine) suspendDevices(ctx context.Context) error {
	return m.eachDevice(func(_ int, d device) error { return d.Core().Suspend(ctx) })
}

func (m *Machine) resumeDevices(again bool) {
	for _, d := range m.devices {
		d.Resume(again)
	}
}

// saveDevices adds the devices' states to s.
func (m *Machine) saveDevices(s *machineState) error {
	return m.eachDevice(func(_ int, d device) error { return d.save(s) })
}

// restoreDevices gives the devices the states in s.
func (m *Machine) restoreDevices(s *machineState) error {
	if own, other := s.deviceStates(m.cfg.Transport); own != len(m.devices) || other != 0 {
		return fmt.Errorf("%w: it has %d, the machine %d", ErrSnapshotDevices, own+other, len(m.devices))
	}
	return m.eachDevice(func(i int, d device) error { return d.restore(s, i) })
}

// closeDevices ends them all at once, so that those that hang share one limit.
// It may be called again.
func (m *Machine) closeDevices() error {
	errs := make([]error, len(m.devices))
	var wg sync.WaitGroup
	for i, d := range m.devices {
		wg.Go(func() {
			if err := d.Close(); err != nil {
				errs[i] = fmt.Errorf("device %d: %w", i, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// hangs tells from closeDevices' error whether a device still works, so that
// its backend may write to the guest's memory.
func hangs(err error) bool { return errors.Is(err, context.DeadlineExceeded) }
