package pci_test

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

const (
	decode = 1 << 1 // of the command register
	master = 1 << 2
)

// masterDisk is a driver of a disk whose requests can be seen and held.
type masterDisk struct {
	*virtiotest.Block
	p    *virtiotest.PCI
	dev  *virtioblk.Device
	disk *virtioblk.Faulty
	ram  *virtioblk.RAM
}

func newMasterDisk(t *testing.T, before func()) *masterDisk {
	t.Helper()
	d := &masterDisk{ram: virtioblk.NewRAM(4 << 20)}
	d.disk = &virtioblk.Faulty{Backend: d.ram}
	d.disk.Before = func(virtioblk.Op, int64, int64) error {
		if before != nil {
			before()
		}
		return nil
	}
	g := virtiotest.NewGuest(4 << 20)
	d.p, d.dev = open(t, g, virtioblk.Config{Backend: d.disk}, pci.Options{})
	d.Block = virtiotest.NewBlock(virtiotest.Start(t, d.p, g, virtiotest.BlockFeatures&^virtio.FeatureEventIdx, 16))
	return d
}

// read offers a read of one sector and rings the doorbell.
func (d *masterDisk) read(t *testing.T) (status *byte) {
	t.Helper()
	at, mem := d.Guest.Alloc(1024, 64)
	clear(mem[:32])
	mem[32] = 0xff
	if _, err := d.Rings[0].Add(virtiotest.Buf{Addr: at, Len: 16}, virtiotest.Buf{Addr: at + 512, Len: 512, Write: true},
		virtiotest.Buf{Addr: at + 32, Len: 1, Write: true}); err != nil {
		t.Fatal(err)
	}
	d.Rings[0].Publish()
	d.p.Notify(0)
	return &mem[32]
}

// still checks that the function does nothing for longer than serving takes.
func (d *masterDisk) still(t *testing.T, what string) {
	t.Helper()
	calls, irqs, conf := d.disk.Calls.Load(), d.QueueInterrupts(0), d.ConfigInterrupts()
	before := bytes.Clone(d.Guest.Bytes)
	time.Sleep(30 * time.Millisecond)
	if !bytes.Equal(before, d.Guest.Bytes) {
		t.Errorf("%s: guest memory changes", what)
	}
	if n := d.disk.Calls.Load(); n != calls {
		t.Errorf("%s: %d requests are served", what, n-calls)
	}
	if d.QueueInterrupts(0) != irqs || d.ConfigInterrupts() != conf {
		t.Errorf("%s: messages are sent", what)
	}
}

// Without the bus master bit a function touches no memory and sends no
// message; with it, it goes on from where it was.
func TestBusMaster(t *testing.T) {
	d := newMasterDisk(t, nil)
	for range 3 {
		if st, _ := d.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 512)); st != 0 {
			t.Fatal(st)
		}
	}
	irqs := d.QueueInterrupts(0)
	d.p.SetCfg(4, 2, decode)
	status := d.read(t)
	d.ram.Resize(8 << 20)
	if err := d.dev.Resized(); err != nil {
		t.Fatal(err)
	}
	d.still(t, "bit clear")
	if *status != 0xff || d.Rings[0].UsedIdx() != 3 {
		t.Errorf("bit clear: status %d, used.idx %d", *status, d.Rings[0].UsedIdx())
	}
	if v := d.p.Mem(d.p.PBA, 8); v != 1<<0 {
		t.Errorf("bit clear: pending %#x, want the configuration's message", v)
	}
	d.p.SetCfg(4, 2, decode|master)
	d.Wait(0)
	virtiotest.Eventually(t, "the messages", func() bool {
		return d.QueueInterrupts(0) > irqs && d.ConfigInterrupts() == 1 && d.p.Mem(d.p.PBA, 8) == 0
	})
	if *status != 0 {
		t.Errorf("status %d", *status)
	}
	for range 3 { // with nothing to do meanwhile: the driver is to notify again
		d.p.SetCfg(4, 2, decode)
		d.p.SetCfg(4, 2, decode|master)
		if st, _ := d.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 512)); st != 0 {
			t.Error(st)
		}
	}
}

// A driver may come up before it sets the bit, and reset the device without it.
func TestBusMasterLate(t *testing.T) {
	d := newMasterDisk(t, nil)
	d.p.SetCfg(4, 2, decode)
	d.Block = virtiotest.NewBlock(virtiotest.Start(t, d.p, d.Guest, virtiotest.BlockFeatures&^virtio.FeatureEventIdx, 16))
	status := d.read(t)
	d.still(t, "at DRIVER_OK")
	d.p.SetCfg(4, 2, decode|master)
	d.Wait(0)
	if *status != 0 {
		t.Errorf("status %d", *status)
	}
	d.p.F.Reset() // power-on: the bit is clear
	if v := d.p.Cfg(4, 2); v != 0 {
		t.Errorf("command %#x after a machine reset", v)
	}
	d.p.BringUp()
	d.Block = virtiotest.NewBlock(virtiotest.Start(t, d.p, d.Guest, virtiotest.BlockFeatures&^virtio.FeatureEventIdx, 16))
	if st, _ := d.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 512)); st != 0 {
		t.Error(st)
	}
}

// Clearing the bit waits for the requests in flight, but not for ever: their
// back-end may hang, and a processor waits.
func TestBusMasterInFlight(t *testing.T) {
	for name, hangs := range map[string]bool{"ends": false, "hangs": true} {
		t.Run(name, func(t *testing.T) {
			gate, entered := make(chan struct{}), make(chan struct{}, 16)
			d := newMasterDisk(t, func() { entered <- struct{}{}; <-gate })
			d.read(t)
			<-entered
			cleared := make(chan uint16)
			go func() {
				d.p.SetCfg(4, 2, decode)
				cleared <- d.Rings[0].UsedIdx()
			}()
			virtiotest.Eventually(t, "the bit", func() bool { return d.p.Cfg(4, 2)&master == 0 })
			if hangs {
				if used := <-cleared; used != 0 {
					t.Errorf("used.idx %d", used)
				}
				d.p.SetCfg(4, 2, decode|master)
				close(gate)
			} else {
				close(gate)
				if used := <-cleared; used != 1 {
					t.Errorf("the write returns with used.idx %d, want 1", used)
				}
				d.still(t, "drained")
				d.p.SetCfg(4, 2, decode|master)
			}
			d.Wait(0)
			virtiotest.Eventually(t, "the message", func() bool { return d.QueueInterrupts(0) > 0 })
			if st, _ := d.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 512)); st != 0 {
				t.Error(st)
			}
		})
	}
}

// Neither the end of a suspension nor a state serves queues while the bit is
// clear.
func TestBusMasterState(t *testing.T) {
	d := newMasterDisk(t, nil)
	d.p.SetCfg(4, 2, decode)
	status := d.read(t)
	if err := d.p.F.Core().Suspend(context.Background()); err != nil {
		t.Fatal(err)
	}
	s, err := d.p.F.State()
	if err != nil {
		t.Fatal(err)
	}
	d.p.F.Resume(false)
	d.still(t, "resumed")
	if err := d.p.F.Core().Suspend(context.Background()); err != nil {
		t.Fatal(err)
	}
	d.p.SetCfg(4, 2, decode|master)
	d.still(t, "suspended with the bit")
	if err := d.p.F.SetState(s); err != nil {
		t.Fatal(err)
	}
	d.p.F.Resume(true)
	d.still(t, "after SetState")
	d.p.SetCfg(4, 2, decode|master)
	d.Wait(0)
	if *status != 0 {
		t.Errorf("status %d", *status)
	}
}
