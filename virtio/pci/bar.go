package pci

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
)

// barState is where the BAR is, and which doorbells the machine has bound.
type barState struct {
	mu    sync.Mutex
	addr  atomic.Uint64 // base address | barOn
	bound []bool        // by queue, at the current base
}

const barOn = 1

func (b *barState) init(queues int) { b.bound = make([]bool, queues) }

// base returns the address of the BAR if memory decoding is on.
func (b *barState) base() (uint64, bool) {
	a := b.addr.Load()
	return a &^ barOn, a&barOn != 0
}

// updateBAR follows the BAR and command registers.
func (f *Function) updateBAR() {
	f.bar.mu.Lock()
	defer f.bar.mu.Unlock()
	f.cfg.mu.Lock()
	addr := binary.LittleEndian.Uint64(f.cfg.b[cfgBAR0:]) &^ 0xf
	on := f.cfg.b[cfgCommand]&cmdMemory != 0
	f.cfg.mu.Unlock()
	if addr == 0 || addr+f.barSize < addr {
		on = false // not placed yet, or being sized
	}
	f.bar.placeLocked(f, addr, on)
}

// place moves the doorbells along with the BAR.
func (b *barState) place(f *Function, addr uint64, on bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.placeLocked(f, addr, on)
}

func (b *barState) placeLocked(f *Function, addr uint64, on bool) {
	old, was := b.base()
	if was == on && (old == addr || !on) {
		return
	}
	for i := range b.bound {
		if b.bound[i] {
			b.bound[i] = false
			if err := f.host.UnbindDoorbell(old+doorbell(i), f.core.Kick(i)); err != nil {
				f.log.Warn("virtio/pci: unbinding a doorbell", "queue", i, "error", err)
			}
		}
	}
	if !on {
		b.addr.Store(0)
		return
	}
	b.addr.Store(addr | barOn)
	for i := range b.bound {
		err := f.host.BindDoorbell(addr+doorbell(i), f.core.Kick(i))
		if b.bound[i] = err == nil; err != nil {
			f.log.Warn("virtio/pci: binding a doorbell, writes to it are handled instead", "queue", i, "error", err)
		}
	}
}

func doorbell(queue int) uint64 { return notifyOff + notifyMultiplier*uint64(queue) }

// locate turns a guest-physical range into an offset in the BAR.
func (f *Function) locate(addr uint64, n int) (uint64, bool) {
	base, on := f.bar.base()
	off := addr - base
	if !on || addr < base || off >= f.barSize || uint64(n) > f.barSize-off {
		return 0, false
	}
	return off, true
}

// ReadMem serves a guest read at a guest-physical address; false means the
// address is in none of the function's enabled BARs.
func (f *Function) ReadMem(addr uint64, p []byte) bool {
	off, ok := f.locate(addr, len(p))
	if ok {
		f.readBAR(off, p)
	}
	return ok
}

// WriteMem serves a guest write at a guest-physical address; false means the
// address is in none of the function's enabled BARs.
func (f *Function) WriteMem(addr uint64, p []byte) bool {
	off, ok := f.locate(addr, len(p))
	if ok {
		f.writeBAR(off, p)
	}
	return ok
}

// readBAR reads len(p) bytes at an offset that is inside the BAR.
func (f *Function) readBAR(off uint64, p []byte) {
	clear(p)
	switch {
	case len(p) == 0:
	case off < isrOff:
		f.readCommon(off-commonOff, p)
	case off == isrOff:
		p[0] = byte(f.isr.bits.Swap(0)) // reading clears (section 4.1.4.5)
		f.updateINTx()
	case off >= deviceOff && off < deviceOff+deviceLen:
		f.core.ReadConfig(uint32(off-deviceOff), p[:min(uint64(len(p)), deviceOff+deviceLen-off)])
	case off >= msixTableOff && off < notifyOff:
		f.msix.read(off, p)
	}
}

// writeBAR writes p at an offset that is inside the BAR.
func (f *Function) writeBAR(off uint64, p []byte) {
	switch {
	case len(p) == 0:
	case off < isrOff:
		f.writeCommon(off-commonOff, p)
	case off >= deviceOff && off < deviceOff+deviceLen:
		f.core.WriteConfig(uint32(off-deviceOff), p[:min(uint64(len(p)), deviceOff+deviceLen-off)])
	case off >= msixTableOff && off < msixPBAOff:
		f.msix.write(off-msixTableOff, p)
	case off >= notifyOff:
		if ev := f.core.Kick(int((off - notifyOff) / notifyMultiplier)); ev != nil {
			ev.Signal() // fails only when the function is closed
		}
	}
}
