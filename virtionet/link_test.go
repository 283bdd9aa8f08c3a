package virtionet_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtionet"
)

// end is a device as a link sees it: it remembers what it was told.
type end struct {
	mu  sync.Mutex
	got [][]byte
	up  bool
}

func (e *end) Receive(p []byte) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.got = append(e.got, bytes.Clone(p))
	return true
}

func (e *end) SetLink(up bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.up = up
}

// packets takes what came so far.
func (e *end) packets() [][]byte {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.got)
}

func (e *end) isUp() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.up
}

func attach(t *testing.T, l virtionet.Link) *end {
	t.Helper()
	e := &end{}
	if err := l.Attach(e); err != nil {
		t.Fatal(err)
	}
	return e
}

func TestPair(t *testing.T) {
	la, lb := virtionet.NewPair()
	la.Send(virtiotest.Packet(60, 1)) // nobody is there
	a := attach(t, la)
	if a.isUp() {
		t.Error("up with one end")
	}
	b := attach(t, lb)
	if !a.isUp() || !b.isUp() {
		t.Error("down with both ends")
	}
	if err := la.Attach(&end{}); !errors.Is(err, virtionet.ErrAttached) {
		t.Error(err)
	}
	p := virtiotest.Packet(60, 2)
	la.Send(p)
	if got := b.packets(); len(got) != 1 || !bytes.Equal(got[0], p) || len(a.packets()) != 0 {
		t.Errorf("received %x and %x", got, a.packets())
	}
	for range 2 {
		if err := la.Close(); err != nil {
			t.Error(err)
		}
	}
	lb.Send(p)
	if b.isUp() || len(a.packets()) != 0 {
		t.Error("the link lives on without an end")
	}
	if err := la.Attach(&end{}); !errors.Is(err, virtionet.ErrAttached) {
		t.Error(err)
	}
	lb.Close()
}

// Two devices on a cable: what one driver sends the other receives, also where
// that one knows no offloads.
func TestPairOfDevices(t *testing.T) {
	la, lb := virtionet.NewPair()
	defer la.Close()
	defer lb.Close()
	open := func(l virtionet.Link, features uint64) *virtiotest.Net {
		g := virtiotest.NewGuest(1 << 20)
		return virtiotest.NewNet(virtiotest.Start(t, openPCI(t, newDevice(t, virtionet.Config{Link: l}), g), g, features, 16))
	}
	a, b := open(la, virtiotest.NetFeatures), open(lb, virtiotest.RingFeatures)
	p := virtiotest.TCPPacket(2500, 1000)
	a.Transmit(1, p)
	var data []byte
	for range 3 {
		b.Post(1526)
		got, _ := b.Receive()
		data = append(data, got[12+54:]...)
	}
	if !bytes.Equal(data, p[12+54:]) {
		t.Error("the data changed")
	}
}

func newHub(t *testing.T, seed uint64, f virtionet.Faults, n int) (h *virtionet.Hub, ports []*virtionet.Port, ends []*end) {
	t.Helper()
	h, err := virtionet.NewHub(seed, f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(h.Close(), h.Close()); err != nil {
			t.Error(err)
		}
	})
	for range n {
		p := h.Port()
		ports, ends = append(ports, p), append(ends, attach(t, p))
	}
	return h, ports, ends
}

func TestHub(t *testing.T) {
	h, ports, ends := newHub(t, 1, virtionet.Faults{}, 3)
	counts := func() (n [3]int) {
		for i, e := range ends {
			n[i] = len(e.packets())
		}
		return n
	}
	p := virtiotest.Packet(60, 1)
	ports[0].Send(p)
	if n := counts(); n != [3]int{0, 1, 1} {
		t.Errorf("packets %v", n)
	}
	h.Cut(ports[0], ports[1], true)
	ports[0].Send(p)
	ports[1].Send(p)
	if n := counts(); n != [3]int{0, 1, 3} || !ends[1].isUp() {
		t.Errorf("packets %v with a cut", n)
	}
	h.Cut(ports[1], ports[0], false)
	ports[0].Send(p)
	if n := counts(); n != [3]int{0, 2, 4} {
		t.Errorf("packets %v without it", n)
	}
	ports[2].SetLink(false)
	if ends[2].isUp() {
		t.Error("up without its plug")
	}
	ports[2].Close()
	ports[0].Send(p)
	if n := counts(); n != [3]int{0, 3, 4} {
		t.Errorf("packets %v without a port", n)
	}
	if err := ports[2].Attach(&end{}); !errors.Is(err, virtionet.ErrAttached) {
		t.Error(err)
	}
	h.Close()
	ports[0].Send(p)
	if n := counts(); n != [3]int{0, 3, 4} {
		t.Errorf("packets %v after Close", n)
	}
}

// Loss and duplication follow from the seed, and are about as frequent as
// they should be.
func TestHubFaults(t *testing.T) {
	arrived := func(seed uint64) (seq []byte) {
		_, ports, ends := newHub(t, seed, virtionet.Faults{Loss: 0.3, Duplicate: 0.2}, 2)
		for i := range 250 {
			p := virtiotest.Packet(60, 0)
			p[60] = byte(i)
			ports[0].Send(p)
		}
		for _, p := range ends[1].packets() {
			seq = append(seq, p[60])
		}
		return seq
	}
	a, b, c := arrived(1), arrived(1), arrived(2)
	if !bytes.Equal(a, b) || bytes.Equal(a, c) {
		t.Error("the seed does not decide")
	}
	if n := len(slices.Compact(slices.Clone(a))); n < 140 || n > 210 { // 175 are expected
		t.Errorf("%d of 250 packets arrive", n)
	}
	if n := len(a) - len(slices.Compact(slices.Clone(a))); n < 15 || n > 60 { // 35
		t.Errorf("%d packets arrive twice", n)
	}
	for _, f := range []virtionet.Faults{{Loss: -1}, {Loss: 1.1}, {Duplicate: 2}, {Delay: -1}, {Jitter: -1}} {
		if h, err := virtionet.NewHub(1, f); err == nil {
			t.Errorf("%+v is accepted", f)
			h.Close()
		}
	}
}

// A delay alone keeps the order, jitter does not; nothing comes too early.
func TestHubDelay(t *testing.T) {
	h, ports, ends := newHub(t, 1, virtionet.Faults{Delay: 20 * time.Millisecond}, 2)
	send := func() {
		for i := range byte(50) {
			ports[0].Send(virtiotest.Packet(60, i))
		}
	}
	start := time.Now()
	send()
	virtiotest.Eventually(t, "the first packet", func() bool { return len(ends[1].packets()) > 0 })
	if d := time.Since(start); d < 20*time.Millisecond {
		t.Errorf("it came after %v", d)
	}
	virtiotest.Eventually(t, "all packets", func() bool { return len(ends[1].packets()) == 50 })
	for i, p := range ends[1].packets() {
		if !bytes.Equal(p, virtiotest.Packet(60, byte(i))) {
			t.Fatalf("packet %d is another one", i)
		}
	}
	if err := h.SetFaults(virtionet.Faults{Jitter: 5 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	send()
	virtiotest.Eventually(t, "all packets", func() bool { return len(ends[1].packets()) == 100 })
	if slices.EqualFunc(ends[1].packets()[:50], ends[1].packets()[50:], bytes.Equal) {
		t.Error("jitter keeps the order")
	}
}

// failing is a writer that has room for n bytes.
type failing struct{ n int }

func (f *failing) Write(p []byte) (int, error) {
	if f.n -= len(p); f.n < 0 {
		return 0, errors.New("full")
	}
	return len(p), nil
}

func TestRecorder(t *testing.T) {
	la, lb := virtionet.NewPair()
	var file bytes.Buffer
	r, err := virtionet.NewRecorder(la, &file)
	if err != nil {
		t.Fatal(err)
	}
	a, b := attach(t, r), attach(t, lb)
	if !a.isUp() || r.Offloads() != la.Offloads() {
		t.Error("the link is not what it records")
	}
	out, in := virtiotest.TCPPacket(101, 0), virtiotest.Packet(60, 1)
	r.Send(out)
	lb.Send(in)
	if len(a.packets()) != 1 || len(b.packets()) != 1 || !bytes.Equal(b.packets()[0], out) {
		t.Error("packets do not pass as they are")
	}
	for range 2 {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	le, f := binary.LittleEndian, file.Bytes()
	if le.Uint32(f) != 0xa1b23c4d || le.Uint32(f[4:]) != 4<<16|2 || le.Uint32(f[20:]) != 1 {
		t.Fatalf("file header %x", f[:24])
	}
	f = f[24:]
	for i, want := range [][]byte{out[12:], in[12:]} {
		n := int(le.Uint32(f[8:]))
		if n != len(want) || le.Uint32(f[12:]) != uint32(n) || le.Uint32(f) == 0 || le.Uint32(f[4:]) >= 1e9 {
			t.Fatalf("record %d: header %x, want %d bytes", i, f[:16], len(want))
		}
		got := bytes.Clone(f[16:][:n])
		if i == 0 { // the checksum is complete
			if bytes.Equal(got[50:52], want[50:52]) {
				t.Error("the checksum is not complete")
			}
			copy(got[50:52], want[50:52])
		}
		if !bytes.Equal(got, want) {
			t.Errorf("record %d: %x, want %x", i, got, want)
		}
		f = f[16+n:]
	}
	if len(f) != 0 {
		t.Errorf("%d bytes are left", len(f))
	}
	lb.Close()
}

// A file that is full is told at the end; the packets pass.
func TestRecorderFull(t *testing.T) {
	if _, err := virtionet.NewRecorder(virtionet.Null{}, &failing{10}); err == nil {
		t.Error("no room for the header, no error")
	}
	la, lb := virtionet.NewPair()
	r, err := virtionet.NewRecorder(la, &failing{24 + 16 + 60})
	if err != nil {
		t.Fatal(err)
	}
	attach(t, r)
	b := attach(t, lb)
	for range 3 {
		r.Send(virtiotest.Packet(60, 1))
	}
	if len(b.packets()) != 3 {
		t.Errorf("%d packets pass", len(b.packets()))
	}
	if err := r.Close(); err == nil {
		t.Error("no error")
	}
	lb.Close()
}
