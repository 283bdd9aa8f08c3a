package virtioblk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// The hostile guest: the fuzzer's input is what is in guest memory and a
// script of what the guest's CPU does. Whatever that is, the device does not
// panic, does not touch anything outside guest memory and the disk, and stops
// when it is told to.

const (
	hostileMemory = 64 << 10
	hostileRing   = 8
	hostileDisk   = 1 << 20
)

// script opcodes; arguments follow as bytes, missing ones are 0.
const (
	opRaw        = iota // register window: offset (2), width (1), value (8)
	opRawRead           // the same, reading
	opConfig            // PCI configuration space, or device configuration
	opStart             // a proper initialization; feature mask (2)
	opQueue             // address and size of queue 0: offset (2) of each part, size (2)
	opStatus            // value (1)
	opNotify            // queue (1)
	opPoke              // guest memory: offset (2), value (8)
	opRequest           // a block request: type (1), sector (8), sizes (2), flags (1)
	opOffer             // head (2)
	opQueueReset        // queue (1)
	opResize            // sectors (2)
	opYield             // lets the device work
	numOps
)

// window is a transport with raw access to its registers.
type window struct {
	virtiotest.Transport
	raw    func(write bool, off uint64, p []byte)
	config func(write bool, off uint16, p []byte)
	close  func() error
}

// hostileMax is the largest size opResize makes. Requests in flight may still
// be for what was the size when they were checked.
const hostileMax = 0xffff * 64

// inside returns a backend that checks what it is asked for.
func inside(t *testing.T, b virtioblk.Backend) virtioblk.Backend {
	size := b.Size()
	if _, ok := b.(*virtioblk.RAM); ok {
		size = hostileMax
	}
	return &virtioblk.Faulty{Backend: b, Before: func(op virtioblk.Op, off, n int64) error {
		if off < 0 || n < 0 || off > size || n > size-off {
			t.Errorf("%s of %d bytes at %d on a disk of %d", op, n, off, size)
			return errors.New("outside")
		}
		return nil
	}}
}

// noFaults is a log handler that fails the test when guest memory faulted:
// that memory is all there.
type noFaults struct{ t *testing.T }

func (noFaults) Enabled(context.Context, slog.Level) bool { return true }
func (h noFaults) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok && errors.Is(err, virtio.ErrFault) {
			h.t.Error(err)
		}
		return true
	})
	return nil
}
func (h noFaults) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h noFaults) WithGroup(string) slog.Handler      { return h }

// hostile runs one input against a device.
func hostile(t *testing.T, mem, script []byte, backend virtioblk.Backend,
	open func(d virtio.Device, g *virtiotest.Guest, log *slog.Logger) (window, error)) {
	g := virtiotest.NewGuest(hostileMemory)
	log := slog.New(noFaults{t})
	d, err := virtioblk.New(virtioblk.Config{Backend: inside(t, backend), Queues: 2, QueueSize: 16, Workers: 4, Logger: log})
	if err != nil {
		t.Fatal(err)
	}
	w, err := open(d, g, log)
	if err != nil {
		t.Fatal(err)
	}
	rings := [2]*virtiotest.Ring{virtiotest.NewRing(g, hostileRing, virtio.FeatureEventIdx), virtiotest.NewRing(g, hostileRing, virtio.FeatureEventIdx)}
	copy(g.Bytes, mem)
	arg := func(n int) (v uint64) {
		var b [8]byte
		script = script[copy(b[:n], script):]
		return binary.LittleEndian.Uint64(b[:])
	}
	width := func() int { return []int{1, 2, 4, 8}[arg(1)%4] }
	for steps := 0; len(script) > 0 && steps < 64; steps++ {
		var b [8]byte
		switch op := arg(1) % numOps; op {
		case opRaw, opRawRead:
			off, n := arg(2), width()
			if op == opRaw {
				binary.LittleEndian.PutUint64(b[:], arg(8))
			}
			w.raw(op == opRaw, off, b[:n])
		case opConfig:
			write, off, n := arg(1)&1 != 0, arg(2), width()
			binary.LittleEndian.PutUint64(b[:], arg(8))
			w.config(write, uint16(off), b[:n])
		case opStart:
			f := virtiotest.Offered(w) &^ (arg(2) << 24)
			w.SetStatus(0)
			w.SetStatus(3)
			w.SetDriverFeatures(0, uint32(f))
			w.SetDriverFeatures(1, uint32(f>>32))
			w.SetStatus(11)
			for i, r := range rings {
				r.Reset()
				w.SetQueue(i, r.Size, r.Desc, r.Driver, r.Device)
				w.EnableQueue(i)
			}
			w.SetStatus(15)
		case opQueue:
			w.SetQueue(0, uint16(arg(2)), virtiotest.GuestBase+arg(2), virtiotest.GuestBase+arg(2), virtiotest.GuestBase+arg(2))
			w.EnableQueue(0)
		case opStatus:
			w.SetStatus(uint8(arg(1)))
		case opNotify:
			w.Notify(int(arg(1)))
		case opPoke:
			off := arg(2) % (hostileMemory - 8)
			binary.LittleEndian.PutUint64(b[:], arg(8))
			g.Memory.Write(virtiotest.GuestBase+off, b[:])
		case opRequest:
			typ, sector, size, how := arg(1), arg(8), arg(2), arg(1)
			r := rings[how&1]
			at := uint64(virtiotest.GuestBase + 0x2000 + steps%8*0x400)
			var h [24]byte
			binary.LittleEndian.PutUint32(h[:], uint32(typ))
			binary.LittleEndian.PutUint64(h[8:], sector)
			if how&2 == 0 {
				g.Memory.Write(at, h[:16])
			}
			bufs := []virtiotest.Buf{{Addr: at, Len: 16}}
			if size > 0 {
				bufs = append(bufs, virtiotest.Buf{Addr: at + 0x20, Len: uint32(size), Write: how&4 != 0})
			}
			bufs = append(bufs, virtiotest.Buf{Addr: at + 0x18, Len: uint32(how >> 4 & 3), Write: how&8 == 0})
			if how&64 != 0 {
				r.AddIndirect(g, at+0x200, bufs...)
			} else {
				r.Add(bufs...)
			}
			r.Publish()
			w.Notify(int(how & 1))
		case opOffer:
			rings[0].Offer(uint16(arg(2)))
			rings[0].Publish()
			w.Notify(0)
		case opQueueReset:
			w.ResetQueue(int(arg(1) & 1))
		case opResize:
			if ram, ok := backend.(*virtioblk.RAM); ok {
				ram.Resize(int64(arg(2)) * 64)
				d.Resized()
			}
		case opYield:
			time.Sleep(50 * time.Microsecond)
		}
		for _, r := range rings { // free what came back
			for range hostileRing {
				if _, _, ok := r.Used(); !ok {
					break
				}
			}
		}
	}
	if err := w.close(); err != nil {
		t.Fatalf("the device does not stop: %v", err)
	}
	if s := d.Stats(); s.InFlight != 0 {
		t.Errorf("%d requests in flight after the end", s.InFlight)
	}
	// After Close nothing touches guest memory.
	before := bytes.Clone(g.Bytes)
	for i := range rings {
		w.Notify(i)
	}
	if !bytes.Equal(before, g.Bytes) {
		t.Error("guest memory changed after Close")
	}
}

func cmd(op byte, args ...any) []byte {
	b := []byte{op}
	for _, a := range args {
		b, _ = binary.Append(b, binary.LittleEndian, a)
	}
	return b
}

// hostileSeeds are scripts that get deep: proper requests of every type, and
// the attacks of VIRTIO-NOTES.
func hostileSeeds(f *testing.F) {
	begin := cmd(opStart, uint16(0))
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	req := func(typ byte, sector uint64, size uint16, how byte) []byte {
		return join(cmd(opRequest, typ, sector, size, how), cmd(opYield))
	}
	for _, s := range [][]byte{
		join(begin, req(0, 0, 512, 0x14), req(1, 3, 1024, 0x10), req(4, 0, 0, 0x10), req(8, 0, 20, 0x14), req(0, 7, 512, 0x55), req(99, 0, 0, 0x11)),
		join(begin, cmd(opPoke, uint16(0x2420), uint64(1)), cmd(opPoke, uint16(0x2428), uint64(8)), req(11, 0, 16, 0x10), req(13, 0, 16, 0x10), req(13, 0, 32, 0x50)),
		join(begin, req(0, 1<<55, 512, 0x14), req(1, ^uint64(0), 512, 0x10), req(0, 0, 511, 0x14), req(0, 0, 512, 0x04)),
		join(cmd(opStart, uint16(0x30)), req(0, 0, 512, 0x14), cmd(opOffer, uint16(0)), cmd(opOffer, uint16(0)), cmd(opYield)),
		join(begin, cmd(opOffer, uint16(9)), cmd(opYield), cmd(opStatus, byte(0)), begin, req(4, 0, 0, 0x10)),
		join(begin, cmd(opQueueReset, byte(0)), cmd(opQueue, uint16(4), uint16(0x1000), uint16(0x1100), uint16(0x1200)), cmd(opNotify, byte(0)), cmd(opYield)),
		join(begin, cmd(opResize, uint16(100)), req(0, 12, 512, 0x14), cmd(opResize, uint16(9000)), req(0, 1000, 512, 0x14)),
		join(cmd(opRaw, uint16(20), byte(0), uint64(1)), cmd(opConfig, byte(1), uint16(4), byte(1), uint64(0)), cmd(opRawRead, uint16(0), byte(2)), cmd(opConfig, byte(1), uint16(0x10), byte(2), ^uint64(0))),
	} {
		f.Add([]byte{}, s, false)
		f.Add(bytes.Repeat([]byte{1, 0, 0xff}, 1000), s, true)
	}
}

// hostileBackends are a RAM disk and an overlay on a base, opened once: making
// files takes longer than the rest.
func hostileBackends(f *testing.F) func(cow bool) virtioblk.Backend {
	dir := f.TempDir()
	base, img := filepath.Join(dir, "base"), filepath.Join(dir, "image.cow")
	if err := os.WriteFile(base, bytes.Repeat([]byte("base"), hostileDisk/4), 0o600); err != nil {
		f.Fatal(err)
	}
	if err := cowdisk.Create(img, cowdisk.CreateOptions{Backing: "base"}); err != nil {
		f.Fatal(err)
	}
	d, err := cowdisk.Open(img, cowdisk.Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		d.Close()
		b, err := os.ReadFile(base)
		if err != nil || !bytes.Equal(b, bytes.Repeat([]byte("base"), hostileDisk/4)) {
			f.Errorf("the base image changed (%v)", err)
		}
	})
	return func(cow bool) virtioblk.Backend {
		if cow {
			return d
		}
		return virtioblk.NewRAM(hostileDisk)
	}
}

func FuzzHostilePCI(f *testing.F) {
	backend := hostileBackends(f)
	hostileSeeds(f)
	f.Fuzz(func(t *testing.T, mem, script []byte, cow bool) {
		hostile(t, mem, script, backend(cow), func(d virtio.Device, g *virtiotest.Guest, log *slog.Logger) (window, error) {
			p, err := virtiotest.NewPCI(d, g, pci.Options{Logger: log})
			if err != nil {
				return window{}, err
			}
			return window{p, func(write bool, off uint64, b []byte) {
				if write {
					p.F.WriteMem(p.Base+off, b)
				} else {
					p.F.ReadMem(p.Base+off, b)
				}
			}, func(write bool, off uint16, b []byte) {
				if write {
					p.F.WriteConfig(off, b)
				} else {
					p.F.ReadConfig(off, b)
				}
			}, func() error {
				err := p.F.Close()
				if n := len(p.Host.Doorbells()); n != 0 || p.Host.OpenMSIs() != 0 {
					err = errors.Join(err, fmt.Errorf("%d doorbells and %d MSIs are left", n, p.Host.OpenMSIs()))
				}
				return err
			}}, nil
		})
	})
}

func FuzzHostileMMIO(f *testing.F) {
	backend := hostileBackends(f)
	hostileSeeds(f)
	f.Fuzz(func(t *testing.T, mem, script []byte, cow bool) {
		hostile(t, mem, script, backend(cow), func(d virtio.Device, g *virtiotest.Guest, log *slog.Logger) (window, error) {
			m, err := virtiotest.NewMMIO(d, g, mmio.Options{Logger: log})
			if err != nil {
				return window{}, err
			}
			return window{m, func(write bool, off uint64, b []byte) {
				if write {
					m.D.Write(off, b)
				} else {
					m.D.Read(off, b)
				}
			}, func(write bool, off uint16, b []byte) {
				if write {
					m.D.Write(0x100+uint64(off), b)
				} else {
					m.D.Read(0x100+uint64(off), b)
				}
			}, m.Close}, nil
		})
	})
}
