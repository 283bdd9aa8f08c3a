package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// msix is the MSI-X capability with its table and pending bits (PCI Local Bus
// 3.0, section 6.8.2).
type msix struct {
	on, masked atomic.Bool
	master     atomic.Bool // a message is a write to memory: not without
	vectors    []vector
}

// vector is a table entry. Each has its own lock, so that queues which
// interrupt through different vectors share none.
type vector struct {
	mu      sync.Mutex
	addr    uint64
	data    uint32
	ctl     uint32 // bit 0: masked
	pending bool
	stale   bool // the message has changed since msi was programmed
	msi     MSI
}

const vectorMasked = 1

func (m *msix) init(host Host, n int) error {
	m.vectors = make([]vector, n)
	for i := range m.vectors {
		v := &m.vectors[i]
		v.ctl, v.stale = vectorMasked, true
		msi, err := host.NewMSI()
		if err != nil {
			return errors.Join(fmt.Errorf("virtio/pci: interrupt vector %d: %w", i, err), m.close())
		}
		v.msi = msi
	}
	return nil
}

func (m *msix) enabled() bool { return m.on.Load() }

// reset returns to the power-on state: off, every vector masked.
func (m *msix) reset() {
	m.on.Store(false)
	m.masked.Store(false)
	for i := range m.vectors {
		v := &m.vectors[i]
		v.mu.Lock()
		v.addr, v.data, v.ctl, v.pending, v.stale = 0, 0, vectorMasked, false, true
		v.mu.Unlock()
	}
}

func (m *msix) close() error {
	m.on.Store(false)
	var errs []error
	for i := range m.vectors {
		v := &m.vectors[i]
		v.mu.Lock()
		if v.msi != nil {
			errs = append(errs, v.msi.Close())
			v.msi = nil
		}
		v.mu.Unlock()
	}
	return errors.Join(errs...)
}

// control follows the message control register; what was pending goes out
// once nothing masks it.
func (m *msix) control(on, masked bool) {
	m.on.Store(on)
	m.masked.Store(masked)
	m.deliverAll()
}

// setMaster follows the bus master bit, without which every message is pending.
func (m *msix) setMaster(on bool) {
	m.master.Store(on)
	m.deliverAll()
}

func (m *msix) deliverAll() {
	for i := range m.vectors {
		v := &m.vectors[i]
		v.mu.Lock()
		m.deliver(v)
		v.mu.Unlock()
	}
}

// signal raises vector i; NO_VECTOR means no interrupt.
func (m *msix) signal(i uint16) {
	if int(i) >= len(m.vectors) {
		return
	}
	v := &m.vectors[i]
	v.mu.Lock()
	defer v.mu.Unlock()
	v.pending = true
	m.deliver(v)
}

// deliver sends v's pending message unless something holds it; v.mu is held.
func (m *msix) deliver(v *vector) {
	if !m.on.Load() || m.masked.Load() || !m.master.Load() || v.ctl&vectorMasked != 0 || v.msi == nil {
		return
	}
	// Program at unmasking, not at the first signal: the machine may
	// need time to set up a route.
	if v.stale {
		if v.msi.Program(v.addr, v.data) != nil {
			return // stays pending; the driver may program something else
		}
		v.stale = false
	}
	if v.pending {
		v.pending = false
		v.msi.Signal() // nothing to be done about an error here
	}
}

// read reads the table or, behind it, the pending bits.
func (m *msix) read(off uint64, p []byte) {
	for i := range p {
		at := off + uint64(i)
		switch {
		case at >= notifyOff:
		case at >= msixPBAOff:
			for bit := range uint64(8) {
				if n := (at-msixPBAOff)*8 + bit; n < uint64(len(m.vectors)) {
					v := &m.vectors[n]
					v.mu.Lock()
					if v.pending {
						p[i] |= 1 << bit
					}
					v.mu.Unlock()
				}
			}
		case (at-msixTableOff)/16 < uint64(len(m.vectors)):
			v := &m.vectors[(at-msixTableOff)/16]
			v.mu.Lock()
			e := v.entry()
			v.mu.Unlock()
			p[i] = e[at%16]
		}
	}
}

func (v *vector) entry() (e [16]byte) {
	binary.LittleEndian.PutUint64(e[0:], v.addr)
	binary.LittleEndian.PutUint32(e[8:], v.data)
	binary.LittleEndian.PutUint32(e[12:], v.ctl)
	return e
}

// write writes the table. An access must not cross an entry: aligned 32-bit
// and 64-bit ones, the only ones allowed, do not.
func (m *msix) write(off uint64, p []byte) {
	if off/16 >= uint64(len(m.vectors)) || off%16+uint64(len(p)) > 16 {
		return
	}
	v := &m.vectors[off/16]
	v.mu.Lock()
	defer v.mu.Unlock()
	e := v.entry()
	copy(e[off%16:], p)
	addr, data := binary.LittleEndian.Uint64(e[0:])&^3, binary.LittleEndian.Uint32(e[8:])
	if addr != v.addr || data != v.data {
		v.addr, v.data, v.stale = addr, data, true
	}
	v.ctl = binary.LittleEndian.Uint32(e[12:]) & vectorMasked
	m.deliver(v)
}
