package virtio9p_test

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

// vanishing is a tree whose root takes the client's memory away when it is
// looked at.
type vanishing struct {
	p9.Attacher
	armed atomic.Bool
	fd    int
}

func (v *vanishing) Attach() (p9.File, error) {
	f, err := v.Attacher.Attach()
	return vanishingFile{f, v}, err
}

type vanishingFile struct {
	p9.File
	v *vanishing
}

func (f vanishingFile) GetAttr(req p9.AttrMask) (p9.QID, p9.AttrMask, p9.Attr, error) {
	if f.v.armed.Load() {
		if err := unix.Ftruncate(f.v.fd, 0); err != nil {
			panic(err)
		}
	}
	return f.File.GetAttr(req)
}

// Memory that is gone when the reply comes ends the queue, in whatever
// goroutine that is found out, and nothing else.
func TestVanishedMemory(t *testing.T) {
	mem, err := virtiotest.NewSharedMemory(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	tree := &vanishing{Attacher: static(t), fd: mem.FD}
	dev := device(t, tree)
	g := virtiotest.NewGuestOn(mem.Bytes)
	const features = virtio.FeatureVersion1
	r := virtiotest.NewRing(g, 16, features)
	kick, err := virtio.NewEvent()
	if err != nil {
		t.Fatal(err)
	}
	defer kick.Close()
	answered := make(chan struct{}, 16)
	q, err := r.Config().Activate(g.Memory, features, kick, func() { answered <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- virtio.CatchFault(func() error { return dev.ServeQueue(0, q) }) }()
	send := func(msg []byte) {
		t.Helper()
		addr, out := g.Alloc(uint64(len(msg)), 16)
		copy(out, msg)
		room, _ := g.Alloc(8192, 16)
		if _, err := r.Add(virtiotest.Buf{Addr: addr, Len: uint32(len(msg))}, virtiotest.Buf{Addr: room, Len: 8192, Write: true}); err != nil {
			t.Fatal(err)
		}
		r.Publish()
		if err := kick.Signal(); err != nil {
			t.Fatal(err)
		}
	}
	for _, msg := range [][]byte{wire.Version(8192), wire.Attach(1, 0), wire.Getattr(1, 0)} {
		send(msg)
		select {
		case <-answered:
		case err := <-served:
			t.Fatal(err)
		}
	}
	tree.armed.Store(true)
	send(wire.Getattr(1, 0))
	select {
	case err := <-served:
		if !errors.Is(err, virtio.ErrFault) {
			t.Errorf("%v, want ErrFault", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("the queue is still served")
	}
	q.Release()
}
