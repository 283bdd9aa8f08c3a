package virtionet_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtionet"
)

// The hostile guest and its hostile peer: the input is what is in guest memory
// and a script of what the guest's CPU and the link do. Whatever that is, the
// device does not panic, hands the link only packets that make sense, and stops
// when it is told to.

const (
	hostileMemory = 64 << 10
	hostileRing   = 8
)

// script opcodes; arguments follow as bytes, missing ones are 0.
const (
	opRegister = iota // offset (2), width (1), value (8)
	opStart           // a proper initialization; features left out (4)
	opStatus          // value (1)
	opPoke            // guest memory: offset (2), value (8)
	opChain           // queue (1), offset (2), two lengths (2), flags (1)
	opOffer           // queue (1), head (2)
	opReset           // queue (1)
	opFrame           // from the link: header (12), length (2), guest memory's content at (2)
	opLink            // up (1)
	opAnnounce
	opYield // lets the device work
	numOps
)

// strict is a Link that looks at what it gets.
type strict struct {
	cable
	t *testing.T
}

func (s *strict) Send(p []byte) {
	n, le := len(p)-virtionet.HeaderSize, binary.LittleEndian
	switch {
	case n < 14 || n > 65553:
		s.t.Errorf("a frame of %d bytes", n)
	case p[0]&^1 != 0 || p[10] != 0 || p[11] != 0:
		s.t.Errorf("header %x", p[:12])
	case p[0] == 1 && int(le.Uint16(p[6:]))+int(le.Uint16(p[8:]))+2 > n:
		s.t.Errorf("header %x of a frame of %d bytes", p[:12], n)
	case p[1] != 0 && (p[0] != 1 || int(le.Uint16(p[2:]))+int(le.Uint16(p[4:])) >= n || le.Uint16(p[4:]) == 0):
		s.t.Errorf("header %x of a frame of %d bytes", p[:12], n)
	case p[1] == 0 && n > 1518:
		s.t.Errorf("a frame of %d bytes that is not segmented", n)
	}
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

// window is a transport with raw access to its registers.
type window struct {
	virtiotest.Transport
	write func(off uint64, p []byte)
	close func() error
}

type attack struct {
	w      window
	g      *virtiotest.Guest
	d      *virtionet.Device
	link   *strict
	rings  []*virtiotest.Ring
	script []byte
}

func (a *attack) arg(n int) uint64 {
	var b [8]byte
	a.script = a.script[copy(b[:n], a.script):]
	return binary.LittleEndian.Uint64(b[:])
}

func (a *attack) step() {
	var b [8]byte
	switch a.arg(1) % numOps {
	case opRegister:
		off, n := a.arg(2), []int{1, 2, 4, 8}[a.arg(1)%4]
		binary.LittleEndian.PutUint64(b[:], a.arg(8))
		a.w.write(off, b[:n])
	case opStart:
		f := virtiotest.Offered(a.w) &^ a.arg(4)
		a.w.SetStatus(0)
		a.w.SetStatus(3)
		a.w.SetDriverFeatures(0, uint32(f))
		a.w.SetDriverFeatures(1, uint32(f>>32))
		a.w.SetStatus(11)
		for i, r := range a.rings {
			r.Reset()
			a.w.SetQueue(i, r.Size, r.Desc, r.Driver, r.Device)
			a.w.EnableQueue(i)
		}
		a.w.SetStatus(15)
	case opStatus:
		a.w.SetStatus(uint8(a.arg(1)))
	case opPoke:
		off := a.arg(2) % (hostileMemory - 8)
		binary.LittleEndian.PutUint64(b[:], a.arg(8))
		a.g.Memory.Write(virtiotest.GuestBase+off, b[:])
	case opChain:
		i := int(a.arg(1)) % len(a.rings)
		at, n, m, how := virtiotest.GuestBase+a.arg(2), uint32(a.arg(2)), uint32(a.arg(2)), a.arg(1)
		bufs := []virtiotest.Buf{{Addr: at, Len: n, Write: how&1 != 0}}
		if m > 0 {
			bufs = append(bufs, virtiotest.Buf{Addr: at + uint64(n), Len: m, Write: how&2 != 0})
		}
		a.rings[i].Add(bufs...)
		a.rings[i].Publish()
		a.w.Notify(i)
	case opOffer:
		i := int(a.arg(1)) % len(a.rings)
		a.rings[i].Offer(uint16(a.arg(2)))
		a.rings[i].Publish()
		a.w.Notify(i)
	case opReset:
		a.w.ResetQueue(int(a.arg(1)) % len(a.rings))
	case opFrame:
		p := make([]byte, virtionet.HeaderSize)
		a.script = a.script[copy(p, a.script):]
		n, at := a.arg(2), a.arg(2)
		p = append(p, a.g.Bytes[at:min(at+n, hostileMemory)]...)
		a.link.Inject(p)
	case opLink:
		a.link.SetLink(a.arg(1)&1 != 0)
	case opAnnounce:
		a.d.Announce()
	case opYield:
		time.Sleep(50 * time.Microsecond)
	}
}

// hostile runs one input against a device.
func hostile(t *testing.T, mem, script []byte, open func(virtio.Device, *virtiotest.Guest, *slog.Logger) (window, error)) {
	a := attack{g: virtiotest.NewGuest(hostileMemory), link: &strict{t: t}, script: script}
	a.d = newDevice(t, virtionet.Config{Link: a.link, Pairs: 2, QueueSize: 16})
	var err error
	if a.w, err = open(a.d, a.g, slog.New(noFaults{t})); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		a.rings = append(a.rings, virtiotest.NewRing(a.g, hostileRing, virtio.FeatureEventIdx))
	}
	copy(a.g.Bytes, mem)
	for steps := 0; len(a.script) > 0 && steps < 64; steps++ {
		a.step()
		for _, r := range a.rings { // free what came back
			for range hostileRing {
				if _, _, ok := r.Used(); !ok {
					break
				}
			}
		}
	}
	if err := a.w.close(); err != nil {
		t.Fatalf("the device does not stop: %v", err)
	}
	before := bytes.Clone(a.g.Bytes)
	a.link.Inject(virtiotest.Packet(100, 1))
	for i := range a.rings {
		a.w.Notify(i)
	}
	if !bytes.Equal(before, a.g.Bytes) {
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

// hostileSeeds are scripts that get deep: packets both ways, with and without
// offloads, commands, and attacks on them.
func hostileSeeds(f *testing.F) {
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	begin, yield := cmd(opStart, uint32(0)), cmd(opYield)
	mem := make([]byte, 0x8000)
	tcp := virtiotest.TCPPacket(3000, 1000)
	copy(mem[0x2000:], tcp)
	copy(mem[0x4000:], []byte{4, 0, 2, 0})
	send := func(queue byte, n uint16) []byte {
		return join(cmd(opChain, queue, uint16(0x2000), uint16(12), n, byte(0)), yield)
	}
	post := cmd(opChain, byte(0), uint16(0x5000), uint16(2000), uint16(0), byte(1))
	frame := cmd(opFrame, tcp[:12], uint16(len(tcp)-12), uint16(0x200c))
	plain := cmd(opFrame, make([]byte, 12), uint16(60), uint16(0x200c))
	for _, s := range [][]byte{
		join(begin, send(1, uint16(len(tcp)-12)), send(3, 100), post, frame, post, post, plain, yield, post, plain, yield),
		join(cmd(opStart, uint32(0x8183)), post, post, post, post, frame, yield, plain, yield),
		join(begin, cmd(opChain, byte(4), uint16(0x4000), uint16(4), uint16(1), byte(2)), yield, send(3, 1000), frame, frame, cmd(opReset, byte(0)), yield),
		join(begin, frame, plain, cmd(opLink, byte(0)), cmd(opLink, byte(1)), cmd(opAnnounce), post, cmd(opStatus, byte(0)), begin, post, plain, yield),
		join(begin, post, cmd(opOffer, byte(0), uint16(0)), cmd(opOffer, byte(0), uint16(0)), plain, plain, yield),
		join(begin, cmd(opChain, byte(0), uint16(0x5000), uint16(1), uint16(0), byte(1)), cmd(opChain, byte(0), uint16(0x5000), uint16(20), uint16(0), byte(0)), plain, yield, cmd(opRegister, uint16(20), byte(0), uint64(0))),
	} {
		f.Add(mem, s)
	}
}

func FuzzHostilePCI(f *testing.F) {
	hostileSeeds(f)
	f.Fuzz(func(t *testing.T, mem, script []byte) {
		hostile(t, mem, script, func(d virtio.Device, g *virtiotest.Guest, log *slog.Logger) (window, error) {
			p, err := virtiotest.NewPCI(d, g, pci.Options{Logger: log})
			if err != nil {
				return window{}, err
			}
			return window{p, func(off uint64, b []byte) { p.F.WriteMem(p.Base+off, b) }, p.F.Close}, nil
		})
	})
}

func FuzzHostileMMIO(f *testing.F) {
	hostileSeeds(f)
	f.Fuzz(func(t *testing.T, mem, script []byte) {
		hostile(t, mem, script, func(d virtio.Device, g *virtiotest.Guest, log *slog.Logger) (window, error) {
			m, err := virtiotest.NewMMIO(d, g, mmio.Options{Logger: log})
			if err != nil {
				return window{}, err
			}
			return window{m, func(off uint64, b []byte) { m.D.Write(off, b) }, m.Close}, nil
		})
	})
}
