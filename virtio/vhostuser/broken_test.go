package vhostuser_test

import (
	"encoding/binary"
	"sync/atomic"
	"testing"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// ringAddr is the payload of SET_VRING_ADDR with addresses of the front-end's.
func ringAddr(ring uint32, desc, used, avail uint64) []byte {
	le := binary.LittleEndian
	p := le.AppendUint32(le.AppendUint32(nil, ring), 0)
	for _, a := range []uint64{desc, used, avail, 0} {
		p = le.AppendUint64(p, a)
	}
	return p
}

// frontEnd sets ring 0 of a running device up again, well or badly.
type frontEnd struct {
	*virtiotest.VhostUser
	t    *testing.T
	ring *virtiotest.Ring
	kick *virtio.Event
}

func (f *frontEnd) must(typ vhostmsg.Type, p []byte, fds ...int) {
	f.t.Helper()
	if err := f.Ack(typ, p, fds...); err != nil {
		f.t.Fatalf("%v: %v", typ, err)
	}
}

// setUp stops the ring and starts it with size and addresses that are off by
// some bytes.
func (f *frontEnd) setUp(size uint32, desc, used, avail int64) {
	f.t.Helper()
	le := binary.LittleEndian
	pair := func(b uint32) []byte { return le.AppendUint32(make([]byte, 4), b) }
	if _, _, err := f.Call(vhostmsg.GetVringBase, pair(0)); err != nil {
		f.t.Fatal(err)
	}
	user := func(a uint64, off int64) uint64 { return a - virtiotest.GuestBase + fuzzUser + uint64(off) }
	f.must(vhostmsg.SetVringNum, pair(size))
	f.must(vhostmsg.SetVringBase, pair(uint32(f.ring.UsedIdx())))
	f.must(vhostmsg.SetVringAddr, ringAddr(0, user(f.ring.Desc, desc), user(f.ring.Device, used), user(f.ring.Driver, avail)))
	f.must(vhostmsg.SetVringKick, make([]byte, 8), f.kick.FD())
	f.must(vhostmsg.SetVringEnable, pair(1))
}

func (f *frontEnd) needsReset() bool {
	f.t.Helper()
	p, _, err := f.Call(vhostmsg.GetStatus, nil)
	if err != nil || len(p) != 8 {
		f.t.Fatalf("GET_STATUS: %x, %v", p, err)
	}
	return p[0]&virtio.StatusNeedsReset != 0
}

// What the guest's driver does wrong breaks its queue, which is told, and
// nothing else: the other queue goes on, the connection too, and the queue runs
// when it has been set up again.
func TestDriverFaults(t *testing.T) {
	const memory = 4 << 20
	for name, fault := range map[string]func(f *frontEnd){
		"size 7":               func(f *frontEnd) { f.setUp(7, 0, 0, 0) },
		"size above the limit": func(f *frontEnd) { f.setUp(virtio.MaxQueueSize, 0, 0, 0) },
		"table unaligned":      func(f *frontEnd) { f.setUp(16, 8, 0, 0) },
		"used unaligned":       func(f *frontEnd) { f.setUp(16, 0, 2, 0) },
		"available unaligned":  func(f *frontEnd) { f.setUp(16, 0, 0, 1) },
		"runs out of memory": func(f *frontEnd) {
			f.setUp(16, int64(memory-16)-int64(f.ring.Desc-virtiotest.GuestBase), 0, 0)
		},
		"size not that of the requests in flight": func(f *frontEnd) { f.setUp(8, 0, 0, 0) },
		"available index far ahead": func(f *frontEnd) {
			f.ring.SetAvailIdx(f.ring.UsedIdx() + 1000)
			f.Notify(0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			v, g, _ := connect(t, blkDevice(t, virtioblk.Config{Queues: 2}), memory)
			mine, theirs := socketpair(t)
			defer mine.Close()
			channel, err := theirs.File()
			if err != nil {
				t.Fatal(err)
			}
			theirs.Close()
			b := virtiotest.NewBlock(virtiotest.Start(t, v, g, virtiotest.BlockFeatures&^virtio.FeatureEventIdx, 16))
			f := &frontEnd{VhostUser: v, t: t, ring: b.Rings[0]}
			f.must(vhostmsg.SetBackendReqFD, nil, int(channel.Fd()))
			channel.Close()
			broken, err := virtio.NewEvent()
			if err != nil {
				t.Fatal(err)
			}
			var breaks atomic.Int32
			listened := make(chan struct{})
			go func() {
				defer close(listened)
				for broken.Wait() == nil {
					breaks.Add(1)
				}
			}()
			defer func() { broken.Close(); <-listened }()
			f.must(vhostmsg.SetVringErr, make([]byte, 8), broken.FD())
			if f.kick, err = virtio.NewEvent(); err != nil {
				t.Fatal(err)
			}
			defer f.kick.Close()
			read := func(queue int) {
				t.Helper()
				if st, _ := b.Request(queue, virtiotest.BlkIn, 0, nil, make([]byte, 512)); st != 0 {
					t.Errorf("queue %d: status %d", queue, st)
				}
			}
			read(0)
			if f.needsReset() {
				t.Fatal("NEEDS_RESET at first")
			}

			fault(f)
			virtiotest.Eventually(t, "the error descriptor", func() bool { return breaks.Load() > 0 })
			virtiotest.Eventually(t, "NEEDS_RESET", f.needsReset)
			var m vhostmsg.Message
			if err := (&vhostmsg.Conn{C: mine}).Read(&m); err != nil || m.Type != vhostmsg.BackendConfigChange {
				t.Errorf("told %v, %v", m.Type, err)
			}
			read(1)
			f.must(vhostmsg.SetMemTable, v.MemTable(), v.Mem.FD)
			read(1)
			if n := breaks.Load(); n != 1 {
				t.Errorf("the queue broke %d times: it does not stay broken", n)
			}

			f.ring.SetAvailIdx(f.ring.UsedIdx())
			f.setUp(16, 0, 0, 0)
			b.Rings[0].Publish()
			if st := f.requestByKick(b); st != 0 {
				t.Errorf("set up again: status %d", st)
			}
			if n := breaks.Load(); n != 1 {
				t.Errorf("the queue broke %d times", n)
			}
			f.must(vhostmsg.SetStatus, make([]byte, 8))
			if f.needsReset() {
				t.Error("NEEDS_RESET after a reset")
			}
		})
	}
}

// requestByKick is a read through ring 0 with the new kick event.
func (f *frontEnd) requestByKick(b *virtiotest.Block) (status byte) {
	done := make(chan struct{})
	rung := make(chan struct{})
	go func() {
		defer close(rung)
		for {
			f.kick.Signal()
			select {
			case <-done:
				return
			default:
			}
		}
	}()
	defer func() { close(done); <-rung }()
	status, _ = b.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 512))
	return status
}

// What a driver asks of the configuration space beyond its end is refused, and
// the connection goes on.
func TestConfigRefused(t *testing.T) {
	v, _, _ := connect(t, blkDevice(t, virtioblk.Config{}), 1<<20)
	le := binary.LittleEndian
	for _, c := range []struct{ off, n uint32 }{{0, 300}, {256, 1}, {^uint32(0), 2}} {
		p := append(le.AppendUint32(le.AppendUint32(nil, c.off), c.n), make([]byte, 4+c.n)...)
		if r, _, err := v.Call(vhostmsg.GetConfig, p); err != nil || len(r) != 0 {
			t.Errorf("reading %d at %d: %d bytes, %v", c.n, c.off, len(r), err)
		}
		if err := v.Ack(vhostmsg.SetConfig, p); err == nil {
			t.Errorf("writing %d at %d is accepted", c.n, c.off)
		}
	}
	var capacity [8]byte
	v.ReadConfig(0, capacity[:])
	if n := le.Uint64(capacity[:]); n != 4<<20/512 {
		t.Errorf("capacity %d", n)
	}
}
