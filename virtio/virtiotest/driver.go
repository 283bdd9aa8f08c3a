package virtiotest

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/moovm/moovm/virtio"
)

// patience is how long a test waits for what must happen. It is never waited
// for what must not.
const patience = 20 * time.Second

// T is what a driver needs of a testing.TB.
type T interface {
	Helper()
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// Must is a T for use outside tests: it panics.
type Must struct{}

// Helper implements T.
func (Must) Helper() {}

// Fatal implements T.
func (Must) Fatal(args ...any) { panic(fmt.Sprint(args...)) }

// Fatalf implements T.
func (Must) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }

// Eventually waits until ok says true and fails the test if it never does.
func Eventually(t T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for n := 0; !ok(); n++ {
		if n > 200 {
			time.Sleep(100 * time.Microsecond)
		}
		if time.Now().After(deadline) {
			t.Fatalf("waited %v for: %s", patience, what)
		}
	}
}

// Driver has a device up and running.
type Driver struct {
	Transport
	Guest    *Guest
	Features uint64
	Rings    []*Ring
	t        T
}

const (
	statusInit = virtio.StatusAcknowledge | virtio.StatusDriver
	statusFeat = statusInit | virtio.StatusFeaturesOK
	statusRun  = statusFeat | virtio.StatusDriverOK
)

// Offered reads the features a device offers.
func Offered(tr Transport) uint64 {
	return uint64(tr.DeviceFeatures(0)) | uint64(tr.DeviceFeatures(1))<<32
}

// Negotiate resets the device and brings it to FEATURES_OK, accepting those of
// want that are offered. It reports what was accepted.
func Negotiate(t T, tr Transport, want uint64) uint64 {
	t.Helper()
	tr.SetStatus(0)
	Eventually(t, "status 0 after reset", func() bool { return tr.Status() == 0 })
	tr.SetStatus(virtio.StatusAcknowledge)
	tr.SetStatus(statusInit)
	f := Offered(tr) & want
	tr.SetDriverFeatures(0, uint32(f))
	tr.SetDriverFeatures(1, uint32(f>>32))
	tr.SetStatus(statusFeat)
	if tr.Status() != statusFeat {
		t.Fatalf("features %#x were refused: status %#x", f, tr.Status())
	}
	return f
}

// Start initializes the device as section 3.1.1 says, with all its queues at
// size (or less, where a queue is smaller), and those of the features in want
// that it offers.
func Start(t T, tr Transport, g *Guest, want uint64, size uint16) *Driver {
	t.Helper()
	d := &Driver{Transport: tr, Guest: g, t: t, Features: Negotiate(t, tr, want)}
	for i := 0; tr.QueueMax(i) != 0; i++ {
		r := NewRing(g, min(size, tr.QueueMax(i)), d.Features)
		tr.SetQueue(i, r.Size, r.Desc, r.Driver, r.Device)
		tr.EnableQueue(i)
		d.Rings = append(d.Rings, r)
	}
	tr.SetStatus(statusRun)
	if tr.Status() != statusRun {
		t.Fatalf("status %#x after DRIVER_OK", tr.Status())
	}
	return d
}

// Kick publishes what was added to queue i and notifies if the device wants it.
func (d *Driver) Kick(i int) {
	if d.Rings[i].Publish() {
		d.Notify(i)
	}
}

// Wait takes the next used element of queue i.
func (d *Driver) Wait(i int) (head uint16, n uint32) {
	d.t.Helper()
	Eventually(d.t, "a used element", func() (ok bool) {
		head, n, ok = d.Rings[i].Used()
		return ok
	})
	return head, n
}

// Do sends one request on queue i and returns the length it comes back with.
func (d *Driver) Do(i int, bufs ...Buf) uint32 {
	d.t.Helper()
	head, err := d.Rings[i].Add(bufs...)
	if err != nil {
		d.t.Fatal(err)
	}
	d.Kick(i)
	got, n := d.Wait(i)
	if got != head {
		d.t.Fatalf("head %d came back, sent %d", got, head)
	}
	return n
}

// Requests and status of a block device.
const (
	BlkIn          = 0
	BlkOut         = 1
	BlkFlush       = 4
	BlkGetID       = 8
	BlkDiscard     = 11
	BlkWriteZeroes = 13

	BlkOK     = 0
	BlkIOErr  = 1
	BlkUnsupp = 2
)

// Segment is a range of a discard or write-zeroes request, in bytes.
func Segment(sector uint64, sectors, flags uint32) []byte {
	b := make([]byte, 16)
	binary.LittleEndian.PutUint64(b, sector)
	binary.LittleEndian.PutUint32(b[8:], sectors)
	binary.LittleEndian.PutUint32(b[12:], flags)
	return b
}

// Block is a Driver that speaks to a block device.
type Block struct {
	*Driver
	base uint64 // one page for header and status, then data
	mem  []byte
}

// BlockData is how many bytes of data a request of Block can have.
const BlockData = 1 << 20

// NewBlock adds to a running driver what it takes to send block requests.
func NewBlock(d *Driver) *Block {
	b := &Block{Driver: d}
	b.base, b.mem = d.Guest.Alloc(4096+BlockData, 4096)
	return b
}

// Request sends a request of the given type with out as its readable and in as
// its writable data; in is filled. It returns the status byte, which is 0xff if
// the device wrote none, and the used length.
func (b *Block) Request(queue int, typ uint32, sector uint64, out, in []byte) (status byte, used uint32) {
	b.t.Helper()
	le := binary.LittleEndian
	le.PutUint32(b.mem, typ)
	le.PutUint32(b.mem[4:], 0)
	le.PutUint64(b.mem[8:], sector)
	b.mem[16] = 0xff
	bufs := []Buf{{Addr: b.base, Len: 16}}
	if len(out) > 0 {
		copy(b.mem[4096:], out)
		bufs = append(bufs, Buf{Addr: b.base + 4096, Len: uint32(len(out))})
	}
	if len(in) > 0 {
		copy(b.mem[4096+len(out):], in) // so that what is not written stays
		bufs = append(bufs, Buf{Addr: b.base + 4096 + uint64(len(out)), Len: uint32(len(in)), Write: true})
	}
	bufs = append(bufs, Buf{Addr: b.base + 16, Len: 1, Write: true})
	used = b.Do(queue, bufs...)
	copy(in, b.mem[4096+len(out):])
	return b.mem[16], used
}
