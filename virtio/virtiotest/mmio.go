package virtiotest

import (
	"encoding/binary"
	"sync"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
)

// MMIO is a driver on a mmio.Device, with an interrupt handler that counts and
// acknowledges the causes.
type MMIO struct {
	D *mmio.Device

	mu     sync.Mutex
	level  bool
	manual bool
	counts [2]uint64 // queue, configuration
	irq    chan struct{}
	done   chan struct{}
}

var _ Transport = (*MMIO)(nil)

// mmioHost is the machine's side of the interrupt line. The handler runs on a
// goroutine of its own, like a vCPU: it must not be called with the device's
// locks held.
type mmioHost struct{ t *MMIO }

func (h mmioHost) SetInterrupt(level bool) {
	h.t.mu.Lock()
	h.t.level = level
	h.t.mu.Unlock()
	if level {
		select {
		case h.t.irq <- struct{}{}:
		default:
		}
	}
}

// NewMMIO puts dev behind a window of registers, with g's memory. Close ends
// both.
func NewMMIO(dev virtio.Device, g *Guest, o mmio.Options) (*MMIO, error) {
	t := &MMIO{irq: make(chan struct{}, 1), done: make(chan struct{})}
	d, err := mmio.New(dev, g.Memory, mmioHost{t}, o)
	if err != nil {
		return nil, err
	}
	t.D = d
	go func() {
		defer close(t.done)
		for range t.irq {
			t.handle()
		}
	}()
	return t, nil
}

// Close ends the device and the interrupt handler.
func (t *MMIO) Close() error {
	err := t.D.Close()
	if err == nil { // else the device may still interrupt
		close(t.irq)
		<-t.done
	}
	return err
}

// Manual stops the interrupt handler from doing anything: the test reads and
// acknowledges InterruptStatus itself.
func (t *MMIO) Manual() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.manual = true
}

// Level is the interrupt line.
func (t *MMIO) Level() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.level
}

func (t *MMIO) handle() {
	t.mu.Lock()
	manual := t.manual
	t.mu.Unlock()
	if manual {
		return
	}
	s := t.Reg(0x60)
	t.SetReg(0x64, s)
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.counts {
		t.counts[i] += uint64(s >> i & 1)
	}
}

// Reg reads a register.
func (t *MMIO) Reg(off uint64) uint32 {
	var b [4]byte
	t.D.Read(off, b[:])
	return binary.LittleEndian.Uint32(b[:])
}

// SetReg writes a register.
func (t *MMIO) SetReg(off uint64, v uint32) {
	var b [4]byte
	binary.LittleEndian.PutUint32(b[:], v)
	t.D.Write(off, b[:])
}

// DeviceID implements Transport.
func (t *MMIO) DeviceID() uint32 { return t.Reg(0x8) }

// Status implements Transport.
func (t *MMIO) Status() uint8 { return uint8(t.Reg(0x70)) }

// SetStatus implements Transport.
func (t *MMIO) SetStatus(v uint8) { t.SetReg(0x70, uint32(v)) }

// DeviceFeatures implements Transport.
func (t *MMIO) DeviceFeatures(sel uint32) uint32 {
	t.SetReg(0x14, sel)
	return t.Reg(0x10)
}

// DriverFeatures implements Transport.
func (t *MMIO) DriverFeatures(sel uint32) uint32 {
	t.SetReg(0x24, sel)
	return t.Reg(0x20)
}

// SetDriverFeatures implements Transport.
func (t *MMIO) SetDriverFeatures(sel, v uint32) {
	t.SetReg(0x24, sel)
	t.SetReg(0x20, v)
}

// Generation implements Transport.
func (t *MMIO) Generation() uint32 { return t.Reg(0xfc) }

// ReadConfig implements Transport.
func (t *MMIO) ReadConfig(off uint32, p []byte) { t.D.Read(0x100+uint64(off), p) }

// WriteConfig implements Transport.
func (t *MMIO) WriteConfig(off uint32, p []byte) { t.D.Write(0x100+uint64(off), p) }

func (t *MMIO) sel(i int) { t.SetReg(0x30, uint32(i)) }

// QueueMax implements Transport.
func (t *MMIO) QueueMax(i int) uint16 {
	t.sel(i)
	return uint16(t.Reg(0x34))
}

// SetQueue implements Transport.
func (t *MMIO) SetQueue(i int, size uint16, desc, driver, device uint64) {
	t.sel(i)
	t.SetReg(0x38, uint32(size))
	for j, a := range []uint64{desc, driver, device} {
		t.SetReg(0x80+16*uint64(j), uint32(a))
		t.SetReg(0x84+16*uint64(j), uint32(a>>32))
	}
}

// EnableQueue implements Transport.
func (t *MMIO) EnableQueue(i int) {
	t.sel(i)
	t.SetReg(0x44, 1)
}

// QueueEnabled implements Transport.
func (t *MMIO) QueueEnabled(i int) bool {
	t.sel(i)
	return t.Reg(0x44) == 1
}

// ResetQueue implements Transport.
func (t *MMIO) ResetQueue(i int) {
	t.sel(i)
	t.SetReg(0xc0, 1)
}

// QueueResetting implements Transport.
func (t *MMIO) QueueResetting(i int) bool {
	t.sel(i)
	return t.Reg(0xc0) == 1
}

// Notify implements Transport.
func (t *MMIO) Notify(i int) { t.SetReg(0x50, uint32(i)) }

// QueueInterrupts implements Transport; it cannot tell the queues apart.
func (t *MMIO) QueueInterrupts(int) uint64 { return t.count(0) }

// ConfigInterrupts implements Transport.
func (t *MMIO) ConfigInterrupts() uint64 { return t.count(1) }

func (t *MMIO) count(i int) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.counts[i]
}
