package pci

import (
	"encoding/binary"
	"fmt"

	"github.com/moovm/moovm/virtio"
)

// State is the state of a suspended Function: plain data.
type State struct {
	Core   virtio.CoreState
	Config [256]byte
	// The common configuration: selectors and vectors.
	DeviceFeature, DriverFeature uint32
	QueueSelect                  uint16
	ConfigVector                 uint16
	QueueVectors                 []uint16
	ISR                          uint8
	Vectors                      []VectorState // the MSI-X table
}

// VectorState is an entry of the MSI-X table with its pending bit.
type VectorState struct {
	Addr    uint64
	Data    uint32
	Masked  bool
	Pending bool
}

// State returns the state of a Function whose Core is suspended.
func (f *Function) State() (State, error) {
	core, err := f.core.State()
	if err != nil {
		return State{}, err
	}
	s := State{Core: core, ISR: uint8(f.isr.bits.Load()), ConfigVector: f.common.configVector()}
	f.cfg.mu.Lock()
	s.Config = f.cfg.b
	f.cfg.mu.Unlock()
	f.common.mu.Lock()
	s.DeviceFeature, s.DriverFeature, s.QueueSelect = f.common.deviceFeature, f.common.driverFeature, f.common.queueSelect
	f.common.mu.Unlock()
	for i := range f.common.queue {
		s.QueueVectors = append(s.QueueVectors, f.common.queueVector(i))
	}
	for i := range f.msix.vectors {
		v := &f.msix.vectors[i]
		v.mu.Lock()
		s.Vectors = append(s.Vectors, VectorState{Addr: v.addr, Data: v.data, Masked: v.ctl&vectorMasked != 0, Pending: v.pending})
		v.mu.Unlock()
	}
	return s, nil
}

// SetState puts a state into a Function that is fresh or suspended; it is
// suspended afterwards. The BAR and the interrupts are placed as the state
// says. Resume lets the function go on.
func (f *Function) SetState(s State) error {
	switch {
	case len(s.QueueVectors) != len(f.common.queue) || len(s.Vectors) != len(f.msix.vectors):
		return fmt.Errorf("%w: it has %d queues and %d vectors, the function %d and %d",
			virtio.ErrState, len(s.QueueVectors), len(s.Vectors), len(f.common.queue), len(f.msix.vectors))
	case s.ISR&^(isrQueue|isrConfig) != 0:
		return fmt.Errorf("%w: ISR %#x cannot be", virtio.ErrState, s.ISR)
	}
	if err := f.core.SetState(s.Core); err != nil {
		return err
	}
	f.common.mu.Lock()
	f.common.deviceFeature, f.common.driverFeature, f.common.queueSelect = s.DeviceFeature, s.DriverFeature, s.QueueSelect
	f.common.mu.Unlock()
	f.common.config.Store(f.vector(s.ConfigVector))
	for i, v := range s.QueueVectors {
		f.common.queue[i].Store(f.vector(v))
	}
	f.isr.bits.Store(uint32(s.ISR))
	f.msix.reset()
	for i, from := range s.Vectors {
		v := &f.msix.vectors[i]
		v.mu.Lock()
		v.addr, v.data, v.pending, v.ctl = from.Addr&^3, from.Data, from.Pending, 0
		if from.Masked {
			v.ctl = vectorMasked
		}
		v.mu.Unlock()
	}
	f.setConfig(s.Config)
	return nil
}

// setConfig takes over what software may write, without the effects that
// writing the PCI_CFG window has.
func (f *Function) setConfig(from [256]byte) {
	c := &f.cfg
	le := binary.LittleEndian
	c.mu.Lock()
	for i, v := range from {
		c.b[i] = c.b[i]&^c.writable[i] | v&c.writable[i]
	}
	c.noINTx.Store(le.Uint16(c.b[cfgCommand:])&cmdINTxDisable != 0)
	ctl := le.Uint16(c.b[msixControl:])
	c.mu.Unlock()
	f.msix.control(ctl&msixCtlOn != 0, ctl&msixCtlMask != 0)
	f.updateBAR()
	f.updateMaster()
	f.updateINTx()
}

// Resume lets a suspended function go on. After SetState, again says that each
// queue's interrupt may have been lost, and raises it once.
func (f *Function) Resume(again bool) {
	f.core.Resume()
	if !again || f.core.Status()&virtio.StatusDriverOK == 0 {
		return
	}
	for i := range f.common.queue {
		if f.core.Queue(i).Ready {
			f.queueInterrupt(i)
		}
	}
	f.configInterrupt()
}
