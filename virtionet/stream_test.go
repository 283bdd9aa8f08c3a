package virtionet_test

import (
	"encoding/binary"
	"net"
	"testing"

	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtionet"
)

// station is a device's end of a link that keeps what it gets.
type station struct {
	up      chan bool
	packets chan []byte
}

func newStation() *station { return &station{make(chan bool, 100), make(chan []byte, 1000)} }

func (s *station) SetLink(up bool) { s.up <- up }
func (s *station) Receive(p []byte) bool {
	s.packets <- append([]byte(nil), p...)
	return true
}

func TestStream(t *testing.T) {
	here, there := net.Pipe()
	a, b := virtionet.NewPair()
	far, near := newStation(), newStation()
	if err := b.Attach(far); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- virtionet.Plug(there, a) }()
	s := virtionet.NewStream(here, a.Offloads())
	if err := s.Attach(near); err != nil {
		t.Fatal(err)
	}
	if !<-near.up || !<-far.up {
		t.Error("the link is not up")
	}
	if err := s.Attach(near); err == nil {
		t.Error("attached twice")
	}
	for i := range 100 {
		s.Send(virtiotest.Packet(60+i, byte(i)))
		b.Send(virtiotest.Packet(1500-i, byte(i)))
		if p := <-far.packets; len(p) != virtionet.HeaderSize+60+i || p[virtionet.HeaderSize] != virtiotest.Packet(60, byte(i))[virtionet.HeaderSize] {
			t.Fatalf("packet %d: %x", i, p)
		}
		if p := <-near.packets; len(p) != virtionet.HeaderSize+1500-i {
			t.Fatalf("packet %d: %x", i, p)
		}
	}
	bad := virtiotest.Packet(60, 0)
	bad[0] = 1 // a checksum beyond the end
	binary.LittleEndian.PutUint16(bad[6:], 100)
	s.Send(bad)
	s.Send(virtiotest.Packet(61, 0))
	if p := <-far.packets; len(p) != virtionet.HeaderSize+61 {
		t.Errorf("a packet that makes no sense came through: %x", p)
	}
	s.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if <-near.up {
		t.Error("the link is up after its end")
	}
}

// When the other process ends, the link is down and everything returns.
func TestStreamEnds(t *testing.T) {
	for name, last := range map[string][]byte{
		"the end":           nil,
		"a record too long": {0, 2, 0, 0},
		"an empty record":   {0, 0, 0, 0},
		"half a record":     {0, 0, 0, 20, 1, 2},
	} {
		here, there := net.Pipe()
		near := newStation()
		s := virtionet.NewStream(here, virtionet.Offloads{})
		if err := s.Attach(near); err != nil {
			t.Fatal(err)
		}
		if len(last) > 0 {
			there.Write(last)
		}
		there.Close()
		if <-near.up {
			t.Errorf("%s: the link is up", name)
		}
		s.Send(virtiotest.Packet(60, 0))
		s.Close()
		s.Close()
	}
}
