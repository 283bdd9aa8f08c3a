package virtiotest

import (
	"encoding/binary"
	"errors"
	"sync/atomic"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/halfword"
)

// Descriptor flags.
const (
	Next     = 1
	Write    = 2
	Indirect = 4
)

// Buf is a buffer of a request: device-readable, or device-writable if Write.
type Buf struct {
	Addr  uint64
	Len   uint32
	Write bool
}

// ErrFull says that the ring has not enough free descriptors.
var ErrFull = errors.New("virtiotest: the ring is full")

// Ring is the driver's side of a split queue. It is not safe for concurrent
// use, except with the device.
type Ring struct {
	Size                 uint16
	Desc, Driver, Device uint64 // guest-physical addresses

	desc, avail, used []byte
	eventIdx          bool
	availWord         *uint32 // flags and idx: only the driver writes them
	flags             uint16
	usedEvent         halfword.Field
	usedFlags         halfword.Field
	usedIdx           halfword.Field
	availEvent        halfword.Field

	free  []uint16   // stack of free descriptors
	next  uint16     // avail.idx to publish
	told  uint16     // avail.idx at the last Publish
	seen  uint16     // used elements taken
	chain [][]uint16 // descriptors of the chain at a head
}

// NewRing lays a ring out in g's memory. features are the negotiated ones.
func NewRing(g *Guest, size uint16, features uint64) *Ring {
	r := &Ring{Size: size, eventIdx: features&virtio.FeatureEventIdx != 0}
	n := uint64(size)
	r.Desc, r.desc = g.Alloc(16*n, 16)
	r.Driver, r.avail = g.Alloc((6+2*n+3)&^3, 4)
	r.Device, r.used = g.Alloc((6+8*n+3)&^3, 4)
	r.availWord = halfword.Word(r.avail, 0)
	r.usedEvent = halfword.At(r.avail, int(4+2*n))
	r.usedFlags = halfword.At(r.used, 0)
	r.usedIdx = halfword.At(r.used, 2)
	r.availEvent = halfword.At(r.used, int(4+8*n))
	r.chain = make([][]uint16, size)
	for i := range r.chain {
		r.chain[i] = make([]uint16, 0, 4)
	}
	r.Reset()
	return r
}

// Reset empties the ring, as a driver does before it enables a queue.
func (r *Ring) Reset() {
	clear(r.desc)
	clear(r.avail)
	clear(r.used)
	r.next, r.told, r.seen, r.flags = 0, 0, 0, 0
	r.free = r.free[:0]
	for i := int(r.Size) - 1; i >= 0; i-- {
		r.free = append(r.free, uint16(i))
		r.chain[i] = r.chain[i][:0]
	}
}

// Config is the ring as a device would be told about it.
func (r *Ring) Config() virtio.QueueConfig {
	return virtio.QueueConfig{MaxSize: r.Size, Size: r.Size, Desc: r.Desc, Driver: r.Driver, Device: r.Device, Ready: true}
}

// SetDesc writes descriptor i as it is, for chains that break the rules.
func (r *Ring) SetDesc(i uint16, addr uint64, n uint32, flags, next uint16) {
	PutDesc(r.desc[16*int(i):], addr, n, flags, next)
}

// PutDesc writes a descriptor to the first 16 bytes of b.
func PutDesc(b []byte, addr uint64, n uint32, flags, next uint16) {
	le := binary.LittleEndian
	le.PutUint64(b, addr)
	le.PutUint32(b[8:], n)
	le.PutUint16(b[12:], flags)
	le.PutUint16(b[14:], next)
}

// Add makes a chain of bufs available, not yet published, and returns its head.
func (r *Ring) Add(bufs ...Buf) (uint16, error) {
	if len(bufs) == 0 || len(bufs) > len(r.free) {
		return 0, ErrFull
	}
	head := r.free[len(r.free)-1]
	ids := r.chain[head][:0]
	for i, b := range bufs {
		id := r.free[len(r.free)-1]
		r.free = r.free[:len(r.free)-1]
		ids = append(ids, id)
		var flags, next uint16
		if b.Write {
			flags |= Write
		}
		if i < len(bufs)-1 {
			flags |= Next
			next = r.free[len(r.free)-1]
		}
		r.SetDesc(id, b.Addr, b.Len, flags, next)
	}
	r.chain[head] = ids
	r.Offer(head)
	return head, nil
}

// AddIndirect makes a chain available through one descriptor that refers to a
// table, which it writes to the guest memory at table (16 bytes per buffer).
func (r *Ring) AddIndirect(g *Guest, table uint64, bufs ...Buf) (uint16, error) {
	b, err := g.Memory.Slice(table, uint64(16*len(bufs)))
	if err != nil {
		return 0, err
	}
	for i, buf := range bufs {
		var flags, next uint16
		if buf.Write {
			flags |= Write
		}
		if i < len(bufs)-1 {
			flags |= Next
			next = uint16(i + 1)
		}
		PutDesc(b[16*i:], buf.Addr, buf.Len, flags, next)
	}
	if len(r.free) == 0 {
		return 0, ErrFull
	}
	head := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	r.chain[head] = append(r.chain[head][:0], head)
	r.SetDesc(head, table, uint32(len(b)), Indirect, 0)
	r.Offer(head)
	return head, nil
}

// Offer puts a head into the available ring, whatever it is.
func (r *Ring) Offer(head uint16) {
	binary.LittleEndian.PutUint16(r.avail[4+2*int(r.next%r.Size):], head)
	r.next++
}

// Publish shows the device everything added so far and reports whether it
// wants to be notified about it.
func (r *Ring) Publish() (notify bool) {
	old := r.told
	r.told = r.next
	r.publish()
	if r.eventIdx {
		return r.next-r.availEvent.Load()-1 < r.next-old
	}
	return r.usedFlags.Load()&1 == 0
}

// SetAvailIdx writes avail.idx as it is.
func (r *Ring) SetAvailIdx(v uint16) {
	r.next, r.told = v, v
	r.publish()
}

// publish writes avail.flags and avail.idx in one step.
func (r *Ring) publish() {
	atomic.StoreUint32(r.availWord, uint32(r.flags)|uint32(r.next)<<16)
}

// setFlags writes avail.flags without publishing anything new.
func (r *Ring) setFlags(f uint16) {
	r.flags = f
	atomic.StoreUint32(r.availWord, uint32(f)|uint32(r.told)<<16)
}

// UsedIdx is used.idx.
func (r *Ring) UsedIdx() uint16 { return r.usedIdx.Load() }

// AvailEvent is where the device wants to be notified (EVENT_IDX).
func (r *Ring) AvailEvent() uint16 { return r.availEvent.Load() }

// Used takes the next used element, if there is one, and frees its chain.
func (r *Ring) Used() (head uint16, n uint32, ok bool) {
	if r.usedIdx.Load() == r.seen {
		return 0, 0, false
	}
	e := r.used[4+8*int(r.seen%r.Size):]
	id := binary.LittleEndian.Uint32(e)
	n = binary.LittleEndian.Uint32(e[4:])
	r.seen++
	head = uint16(id)
	if id < uint32(r.Size) {
		r.free = append(r.free, r.chain[head]...)
		r.chain[head] = r.chain[head][:0]
	}
	return head, n, true
}

// WantInterrupt asks for an interrupt with the next used element; without
// EVENT_IDX with every one. It reports whether some are there already.
func (r *Ring) WantInterrupt() (ready bool) {
	if r.eventIdx {
		r.usedEvent.Store(r.seen)
	} else {
		r.setFlags(0)
	}
	return r.usedIdx.Load() != r.seen
}

// SetUsedEvent writes used_event as it is.
func (r *Ring) SetUsedEvent(v uint16) { r.usedEvent.Store(v) }

// NoInterrupt sets the flag that asks for no interrupts.
func (r *Ring) NoInterrupt() { r.setFlags(1) }

// Free is the number of descriptors not in use.
func (r *Ring) Free() int { return len(r.free) }
