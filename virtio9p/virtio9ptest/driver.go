// Package virtio9ptest is the driver's side of a virtio 9P device: messages go
// through descriptors in guest memory, as a Linux guest's would, for the tests
// of the device and of the file trees behind it.
package virtio9ptest

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/virtiotest"
)

// Layout says how a request's bytes are split into buffers.
type Layout func(readable, writable int) (out, in []int)

// Whole uses one buffer each way, as Linux does for short messages.
func Whole(readable, writable int) (out, in []int) { return []int{readable}, []int{writable} }

// ZeroCopy is what Linux does for a long Tread or Treaddir: the header of the
// reply in a buffer of its own, and pages.
func ZeroCopy(readable, writable int) (out, in []int) {
	return []int{readable}, pages(11, writable)
}

// ZeroCopyWrite is what Linux does for a long Twrite.
func ZeroCopyWrite(readable, writable int) (out, in []int) {
	return pages(23, readable), []int{writable}
}

func pages(first, n int) []int {
	first = min(first, n)
	sizes := []int{first}
	for n -= first; n > 0; n -= 4096 {
		sizes = append(sizes, min(n, 4096))
	}
	return sizes
}

// Splinters splits anywhere, into at most 10 buffers each way.
func Splinters(readable, writable int) (out, in []int) {
	split := func(n int) (sizes []int) {
		for n > 0 && len(sizes) < 9 {
			m := 1 + rand.IntN(min(n, 40))
			sizes = append(sizes, m)
			n -= m
		}
		if n > 0 {
			sizes = append(sizes, n)
		}
		return sizes
	}
	return split(readable), split(writable)
}

// slots is how many requests a Driver has under way at most.
const slots = 8

// Driver drives one device, without a transport in between. Its methods may be
// used from any goroutine.
type Driver struct {
	t      testing.TB
	dev    virtio.Device
	msize  int
	layout Layout

	mu      sync.Mutex
	freed   sync.Cond
	ring    *virtiotest.Ring
	guest   *virtiotest.Guest
	queue   *virtio.Queue
	kick    *virtio.Event
	served  chan error
	irq     chan struct{}
	slots   []*slot
	pending map[uint16]*slot
	stopped bool
}

// slot is memory for one request.
type slot struct {
	out, in     []byte
	outAddr     uint64
	inAddr      uint64
	table       uint64
	done        func(reply []byte)
	outstanding bool
}

// Start activates dev and serves its queue. msize is the room for each
// message. The test's end stops it.
func Start(t testing.TB, dev virtio.Device, msize int, layout Layout) *Driver {
	t.Helper()
	d := &Driver{t: t, dev: dev, msize: msize, layout: layout, guest: virtiotest.NewGuest(1<<20 + slots*(2*msize+3*8192)), pending: make(map[uint16]*slot)}
	d.freed.L = &d.mu
	for range slots {
		s := &slot{}
		s.outAddr, s.out = d.guest.Alloc(uint64(msize), 16)
		s.inAddr, s.in = d.guest.Alloc(uint64(msize), 16)
		s.table, _ = d.guest.Alloc(16*300, 16)
		d.slots = append(d.slots, s)
	}
	d.start()
	t.Cleanup(d.Stop)
	return d
}

func (d *Driver) start() {
	d.t.Helper()
	features := uint64(virtio.FeatureIndirectDesc | virtio.FeatureEventIdx)
	if d.ring == nil {
		d.ring = virtiotest.NewRing(d.guest, d.dev.QueueSizes()[0], features)
	} else {
		d.ring.Reset()
	}
	kick, err := virtio.NewEvent()
	if err != nil {
		d.t.Fatal(err)
	}
	d.kick = kick
	irq := make(chan struct{}, 1)
	d.irq = irq
	d.queue, err = d.ring.Config().Activate(d.guest.Memory, features, kick, func() {
		select {
		case irq <- struct{}{}:
		default:
		}
	})
	if err != nil {
		d.t.Fatal(err)
	}
	if err := d.dev.Activate(d.dev.Features(), nil); err != nil {
		d.t.Fatal(err)
	}
	d.served = make(chan error, 1)
	q, served := d.queue, d.served
	go func() {
		err := d.dev.ServeQueue(0, q)
		q.Release()
		close(irq)
		served <- err
	}()
	go d.collect(irq)
	d.stopped = false
}

// Stop stops the device as a reset would and waits until it has.
func (d *Driver) Stop() {
	d.mu.Lock()
	if d.stopped {
		d.mu.Unlock()
		return
	}
	d.stopped = true
	d.mu.Unlock()
	d.queue.Stop()
	select {
	case err := <-d.served:
		if err != nil {
			d.t.Errorf("ServeQueue: %v", err)
		}
	case <-time.After(20 * time.Second):
		d.t.Error("ServeQueue did not return")
	}
	d.dev.Reset()
	d.kick.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.take()
	if avail, used := d.queue.Position(); avail != used {
		d.t.Errorf("the device took %d chains and returned %d", avail, used)
	}
	for head, s := range d.pending { // offered, never taken
		delete(d.pending, head)
		s.outstanding = false
	}
	d.freed.Broadcast()
}

// Restart is a reset and a new start.
func (d *Driver) Restart() {
	d.Stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.start()
}

func (d *Driver) collect(irq chan struct{}) {
	for range irq {
		d.mu.Lock()
		for d.take(); d.ring.WantInterrupt(); d.take() {
		}
		d.mu.Unlock()
	}
}

// take takes all used elements.
func (d *Driver) take() {
	for {
		head, n, ok := d.ring.Used()
		if !ok {
			return
		}
		s := d.pending[head]
		if s == nil {
			d.t.Errorf("head %d came back unasked", head)
			continue
		}
		delete(d.pending, head)
		if int(n) > len(s.in) {
			d.t.Errorf("used length %d", n)
			n = 0
		}
		reply := append([]byte(nil), s.in[:n]...)
		s.outstanding = false
		d.freed.Broadcast()
		s.done(reply)
	}
}

// Send sends msg with room writable bytes for the reply; done gets what came
// back, cut to the used length, on another goroutine.
func (d *Driver) Send(msg []byte, room int, done func(reply []byte)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var s *slot
	for {
		if d.stopped {
			return io.ErrClosedPipe
		}
		for _, c := range d.slots {
			if !c.outstanding {
				s = c
			}
		}
		if s != nil {
			break
		}
		d.freed.Wait()
	}
	if len(msg) > len(s.out) || room > len(s.in) {
		return errors.New("virtio9ptest: message is longer than msize")
	}
	copy(s.out, msg)
	clear(s.in[:room])
	out, in := d.layout(len(msg), room)
	var bufs []virtiotest.Buf
	add := func(addr uint64, sizes []int, write bool) {
		for _, n := range sizes {
			bufs = append(bufs, virtiotest.Buf{Addr: addr, Len: uint32(n), Write: write})
			addr += uint64(n)
		}
	}
	add(s.outAddr, out, false)
	add(s.inAddr, in, true)
	head, err := d.ring.AddIndirect(d.guest, s.table, bufs...)
	if err != nil {
		return err
	}
	s.done, s.outstanding = done, true
	d.pending[head] = s
	if d.ring.Publish() {
		return d.kick.Signal()
	}
	return nil
}

// Do sends msg and returns what came back.
func (d *Driver) Do(msg []byte, room int) []byte {
	d.t.Helper()
	ch := make(chan []byte, 1)
	if err := d.Send(msg, room, func(b []byte) { ch <- b }); err != nil {
		d.t.Fatal(err)
	}
	select {
	case b := <-ch:
		return b
	case <-time.After(20 * time.Second):
		d.t.Fatal("the chain did not come back")
		return nil
	}
}

// Client returns a 9P client that speaks through the device.
func (d *Driver) Client() *p9.Client {
	d.t.Helper()
	c, err := p9.NewClient(d.Conn(), p9.WithMessageSize(uint32(d.msize)))
	if err != nil {
		d.t.Fatal(err)
	}
	return c
}

// Conn returns the device as a byte stream of 9P messages.
func (d *Driver) Conn() io.ReadWriteCloser {
	c := &conn{d: d}
	c.more.L = &c.mu
	d.t.Cleanup(func() { c.Close() })
	return c
}

type conn struct {
	d   *Driver
	out []byte // an incomplete message

	mu     sync.Mutex
	more   sync.Cond
	in     []byte
	closed bool
}

func (c *conn) Write(p []byte) (int, error) {
	c.out = append(c.out, p...)
	for len(c.out) >= 4 {
		n := int(binary.LittleEndian.Uint32(c.out))
		if len(c.out) < n {
			break
		}
		if err := c.d.Send(c.out[:n], c.d.msize, c.receive); err != nil {
			return 0, err
		}
		c.out = c.out[n:]
	}
	return len(p), nil
}

func (c *conn) receive(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.in = append(c.in, b...)
	c.more.Broadcast()
}

func (c *conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.in) == 0 {
		if c.closed {
			return 0, io.EOF
		}
		c.more.Wait()
	}
	n := copy(p, c.in)
	c.in = c.in[n:]
	return n, nil
}

func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.more.Broadcast()
	return nil
}
