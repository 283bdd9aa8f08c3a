package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/moovm/moovm/virtio/internal/halfword"
)

// MaxQueueSize is the largest queue size a split ring can have.
const MaxQueueSize = 32768

// Errors that say a ring is broken beyond serving: the device must stop and
// wait for a reset. They come wrapped in an explanation.
var (
	ErrRing        = errors.New("virtio: broken ring")
	ErrQueueConfig = errors.New("virtio: invalid queue configuration")
)

// Sizes of ring structures in bytes (section 2.7).
const (
	descSize       = 16
	usedElemSize   = 8
	ringHeaderSize = 4 // flags, idx
)

// Ring flags (section 2.7.6 and 2.7.8).
const (
	availNoInterrupt = 1
	usedNoNotify     = 1
)

// QueueConfig is what a driver programs about a queue, piece by piece: plain
// data without meaning until Activate has validated it.
type QueueConfig struct {
	MaxSize uint16 // what the device offers, in descriptors
	Size    uint16 // what the driver chose: a power of two, at most MaxSize
	Desc    uint64 // guest-physical address of the descriptor table
	Driver  uint64 // guest-physical address of the available ring
	Device  uint64 // guest-physical address of the used ring
	Ready   bool   // the driver has enabled the queue

	// AvailIndex and UsedIndex are the ring positions to start from: 0 for
	// a fresh queue, those of Queue.Position for one that is resumed.
	AvailIndex, UsedIndex uint16
	// Resubmit are heads taken from the ring in an earlier life and never
	// returned; Next yields them first, in this order.
	Resubmit []uint16
	// Tracker, if set, is told about every chain taken and returned.
	Tracker Tracker
}

// Tracker writes down which chains are in flight, so that a device that is
// killed can be continued by another process. Taken is called by Next;
// Returning and Returned around the update of used.idx, one chain at a time.
type Tracker interface {
	Taken(head uint16)
	Returning(head uint16)
	Returned(head, usedIdx uint16)
}

// Activate validates the configuration once and returns the running queue,
// whose geometry never changes. Every error is an ErrQueueConfig.
//
// kick wakes the queue; the caller keeps ownership and may use it again for
// the next activation. interrupt is called, from any goroutine, when the
// driver must be told about used buffers.
func (c QueueConfig) Activate(mem *Memory, features uint64, kick *Event, interrupt func()) (*Queue, error) {
	r, err := c.rings(mem)
	if err != nil {
		return nil, err
	}
	n := uint64(c.Size)
	q := &Queue{
		mem:       mem,
		size:      c.Size,
		mask:      c.Size - 1,
		indirect:  features&FeatureIndirectDesc != 0,
		eventIdx:  features&FeatureEventIdx != 0,
		desc:      r.desc,
		availRing: r.avail[r.pre+ringHeaderSize : r.pre+ringHeaderSize+2*n],
		usedRing:  r.used[ringHeaderSize : ringHeaderSize+usedElemSize*n],

		availFlags: halfword.At(r.avail, int(r.pre)),
		availIdx:   halfword.At(r.avail, int(r.pre)+2),
		usedEvent:  halfword.At(r.avail, int(r.pre+ringHeaderSize+2*n)),
		usedWord:   halfword.Word(r.used, 0),
		availEvent: halfword.At(r.used, int(ringHeaderSize+usedElemSize*n)),

		kick:      kick,
		interrupt: interrupt,
		tracker:   c.Tracker,
		resubmit:  append([]uint16(nil), c.Resubmit...),
		chains:    make([]DescriptorChain, c.Size),
		done:      make(chan struct{}),
		nextAvail: c.AvailIndex,
		usedIdx:   c.UsedIndex,
		signalled: c.UsedIndex,
	}
	q.budget = int(q.size)
	return q, nil
}

// Validate says whether Activate would take the configuration. The rings are
// not touched.
func (c QueueConfig) Validate(mem *Memory) error {
	_, err := c.rings(mem)
	return err
}

// rings are the parts of a queue in guest memory.
type rings struct {
	desc, avail, used []byte
	pre               uint64 // where in avail the available ring begins
}

func (c QueueConfig) rings(mem *Memory) (rings, error) {
	bad := func(format string, args ...any) (rings, error) {
		return rings{}, fmt.Errorf("%w: %s", ErrQueueConfig, fmt.Sprintf(format, args...))
	}
	switch {
	case !c.Ready:
		return bad("the queue is not enabled")
	case c.Size == 0 || c.Size&(c.Size-1) != 0 || c.Size > MaxQueueSize:
		return bad("size %d is not a power of two", c.Size)
	case c.Size > c.MaxSize:
		return bad("size %d is above the maximum of %d", c.Size, c.MaxSize)
	case c.Desc%16 != 0:
		return bad("descriptor table address %#x is not 16-byte aligned", c.Desc)
	case c.Driver%2 != 0:
		return bad("available ring address %#x is not 2-byte aligned", c.Driver)
	case c.Device%4 != 0:
		return bad("used ring address %#x is not 4-byte aligned", c.Device)
	}
	n := uint64(c.Size)
	// The rings are reached through aligned 32-bit words, so the available
	// ring is taken from the word boundary before it to the one behind.
	pre := c.Driver & 2
	availLen := (pre + ringHeaderSize + 2*n + 2 + 3) &^ 3
	usedLen := (ringHeaderSize + usedElemSize*n + 2 + 3) &^ 3
	desc, err := mem.Slice(c.Desc, descSize*n)
	if err != nil {
		return bad("descriptor table at %#x: %v", c.Desc, err)
	}
	avail, err := mem.Slice(c.Driver-pre, availLen)
	if err != nil {
		return bad("available ring at %#x: %v", c.Driver, err)
	}
	used, err := mem.Slice(c.Device, usedLen)
	if err != nil {
		return bad("used ring at %#x: %v", c.Device, err)
	}
	if !halfword.Aligned(avail) || !halfword.Aligned(used) {
		return bad("the memory region is not aligned in the host's address space")
	}
	for i, h := range c.Resubmit {
		if h >= c.Size {
			return bad("resubmitted head %d is not below the size %d", h, c.Size)
		}
		for _, g := range c.Resubmit[:i] {
			if g == h {
				return bad("head %d is resubmitted twice", h)
			}
		}
	}
	return rings{desc, avail, used, pre}, nil
}

// Queue is a running split virtqueue (section 2.7), seen from the device.
//
// One goroutine at a time calls Wait, Next and PutBack; Push, Notify, Wake,
// Stop, Stopped and Done may be called from any. The driver can put anything into the rings: every
// index and address read from there is checked, once, on a private copy.
type Queue struct {
	mem                *Memory
	size, mask         uint16
	indirect, eventIdx bool

	desc       []byte
	availRing  []byte
	usedRing   []byte
	availFlags halfword.Field
	availIdx   halfword.Field
	usedEvent  halfword.Field
	usedWord   *uint32 // flags and idx; only the device writes them
	availEvent halfword.Field

	kick      *Event
	interrupt func()
	tracker   Tracker
	stopped   atomic.Bool
	done      chan struct{} // closed by Stop
	woken     atomic.Bool
	broken    atomic.Uint64

	// The consumer's side.
	chains    []DescriptorChain // one for each head
	resubmit  []uint16
	nextAvail uint16
	budget    int  // chains Next may still yield before the next Wait
	refused   bool // Next returned chains by itself

	resubmitted bool // some chains did not come from the ring

	// The producer's side. Guest memory is touched under mu, and may be gone
	// (CatchFault): only defer unlocks it.
	mu        sync.Mutex
	usedIdx   uint16
	signalled uint16 // usedIdx at the last Notify
	usedFlags uint16
	flagged   bool // usedFlags are in the ring; an earlier life may have left others
	closed    bool
}

// Size is the number of descriptors in the ring.
func (q *Queue) Size() int { return int(q.size) }

// BrokenChains counts the chains the queue returned unserved because they
// made no sense.
func (q *Queue) BrokenChains() uint64 { return q.broken.Load() }

// Position returns the available index Next looks at next and the used index
// of the next Push, to resume the queue later. It is meaningful once the
// consumer has stopped.
func (q *Queue) Position() (avail, used uint16) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.nextAvail, q.usedIdx
}

// Next returns the next available chain. It returns nil if the ring is empty,
// if the queue is stopped, or if it has yielded as many chains as the ring
// has since the last Wait, so that a driver that refills faster than the
// device serves does not keep the device from anything else.
//
// A chain that makes no sense is counted and returned to the driver with
// length 0; Next goes on with the following one. An error (ErrRing) means
// that the ring itself is broken: ServeQueue must return it.
func (q *Queue) Next() (*DescriptorChain, error) {
	for q.budget > 0 && !q.stopped.Load() {
		head, ok, err := q.nextHead()
		if err != nil {
			return nil, err
		}
		if !ok {
			break
		}
		q.budget--
		c := &q.chains[head]
		c.behind = q.nextAvail
		if !c.inFlight.CompareAndSwap(false, true) {
			return nil, fmt.Errorf("%w: head %d was offered again while in flight", ErrRing, head)
		}
		if q.tracker != nil {
			q.tracker.Taken(head)
		}
		if err := q.walk(c, head); err != nil {
			q.broken.Add(1)
			c.clear()
			q.Push(c)
			q.refused = true
			continue
		}
		return c, nil
	}
	if q.refused {
		q.refused = false
		q.Notify()
	}
	return nil, nil
}

func (q *Queue) nextHead() (head uint16, ok bool, err error) {
	if len(q.resubmit) > 0 {
		head = q.resubmit[0]
		q.resubmit = q.resubmit[1:]
		q.resubmitted = true
		return head, true, nil
	}
	idx := q.availIdx.Load()
	if idx == q.nextAvail {
		return 0, false, nil
	}
	if idx-q.nextAvail > q.size {
		return 0, false, fmt.Errorf("%w: avail.idx %d is more than %d ahead of %d", ErrRing, idx, q.size, q.nextAvail)
	}
	head = binary.LittleEndian.Uint16(q.availRing[2*int(q.nextAvail&q.mask):])
	if head >= q.size {
		return 0, false, fmt.Errorf("%w: head %d is not below the size %d", ErrRing, head, q.size)
	}
	q.nextAvail++
	return head, true, nil
}

// PutBack undoes the Next that returned c: the chain was not used and is the
// next one again, now or when the queue is resumed from its Position. Several
// are put back in the reverse order. It reports false where that cannot be,
// and the chain must be pushed: when Next has taken others from the ring since
// (that made no sense), and when chains in flight are written down elsewhere
// (Tracker, Resubmit).
func (q *Queue) PutBack(c *DescriptorChain) bool {
	if q.tracker != nil || q.resubmitted || c.behind != q.nextAvail || !c.inFlight.CompareAndSwap(true, false) {
		return false
	}
	q.nextAvail--
	q.budget++
	return true
}

// Wake makes Wait return true, now or when it is called next, also if there is
// no chain: for a device that waits for something else besides.
func (q *Queue) Wake() {
	q.woken.Store(true)
	q.kick.Signal() // an error means it is closed, and Wait has returned
}

// Wait blocks until there are chains for Next, or Wake was called, or the queue
// is stopped, which it reports as false. It asks the driver for a notification and looks again
// before it sleeps, so none is lost.
func (q *Queue) Wait() bool {
	if q.budget <= 0 {
		runtime.Gosched()
	}
	q.budget = int(q.size)
	for !q.stopped.Load() {
		if q.woken.Swap(false) || q.ready() {
			return true
		}
		// Whoever is ready to serve a chain goes first: the kernel does not
		// give our processor to them before it notices that we sleep. With
		// nobody there it would only wake a thread up to find that out.
		if q.serving() {
			runtime.Gosched()
		}
		q.arm()
		if q.ready() {
			q.disarm()
			return true
		}
		if q.stopped.Load() {
			break
		}
		if err := q.kick.Wait(); err != nil {
			return false // the event is closed: the transport is gone
		}
		q.disarm()
	}
	return false
}

// serving reports whether there are chains that were not pushed yet.
func (q *Queue) serving() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.usedIdx != q.nextAvail
}

func (q *Queue) ready() bool { return len(q.resubmit) > 0 || q.availIdx.Load() != q.nextAvail }

// arm asks the driver to notify about the next chain, disarm not to. With
// EVENT_IDX the driver stays quiet by itself once it has passed avail_event.
func (q *Queue) arm() {
	if !q.eventIdx {
		q.setUsedFlags(0)
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if !q.closed {
		q.availEvent.Store(q.nextAvail)
	}
}

func (q *Queue) disarm() {
	if !q.eventIdx {
		q.setUsedFlags(usedNoNotify)
	}
}

func (q *Queue) setUsedFlags(f uint16) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if (q.usedFlags != f || !q.flagged) && !q.closed {
		q.usedFlags, q.flagged = f, true
		q.publishUsed()
	}
}

// Push puts a chain into the used ring with the length its Writer has
// written. The chain belongs to the queue again and must not be touched.
func (q *Queue) Push(c *DescriptorChain) {
	q.mu.Lock()
	defer q.mu.Unlock()
	head := c.head
	if q.closed || !c.inFlight.Load() {
		return
	}
	if q.tracker != nil {
		q.tracker.Returning(head)
	}
	q.putUsed(c)
	q.publishUsed()
	if q.tracker != nil {
		q.tracker.Returned(head, q.usedIdx)
	}
}

// PushAll is Push for chains that the driver must see returned at the same
// time, as the buffers of one received packet (section 5.1.6.4.1). With a
// Tracker, which knows no such thing, they are pushed one by one.
func (q *Queue) PushAll(cs []*DescriptorChain) {
	if q.tracker != nil {
		for _, c := range cs {
			q.Push(c)
		}
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	for _, c := range cs {
		q.putUsed(c)
	}
	q.publishUsed()
}

// putUsed writes the used element of a chain that is in flight; mu is held.
func (q *Queue) putUsed(c *DescriptorChain) {
	head, n := c.head, c.Written()
	if !c.inFlight.CompareAndSwap(true, false) {
		return
	}
	e := q.usedRing[usedElemSize*int(q.usedIdx&q.mask):][:usedElemSize]
	binary.LittleEndian.PutUint64(e, uint64(head)|uint64(n)<<32)
	q.usedIdx++
}

// publishUsed shows the driver the used elements written so far; mu is held.
func (q *Queue) publishUsed() {
	atomic.StoreUint32(q.usedWord, uint32(q.usedFlags)|uint32(q.usedIdx)<<16)
}

// Notify interrupts the driver if it wants to know about any of the chains
// pushed since the last Notify.
func (q *Queue) Notify() {
	if q.wantsInterrupt() {
		q.interrupt()
	}
}

func (q *Queue) wantsInterrupt() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed || q.usedIdx == q.signalled {
		return false
	}
	since := q.usedIdx - q.signalled
	q.signalled = q.usedIdx
	if q.eventIdx {
		// Section 2.7.7.2: some element of the batch crosses used_event.
		return q.usedIdx-q.usedEvent.Load()-1 < since
	}
	return q.availFlags.Load()&availNoInterrupt == 0
}

// Stop makes Wait return false and Next return nothing. Chains in flight can
// still be pushed.
func (q *Queue) Stop() {
	if !q.stopped.Swap(true) {
		close(q.done)
		q.kick.Signal() // an error means it is closed, and Wait has returned
	}
}

// Stopped reports whether Stop was called.
func (q *Queue) Stopped() bool { return q.stopped.Load() }

// Done is closed when Stop is called.
func (q *Queue) Done() <-chan struct{} { return q.done }

// Release ends all access to the rings: a later Push or Notify does nothing.
// Transports call it when ServeQueue has returned, or when they can no longer
// wait for it.
func (q *Queue) Release() {
	q.Stop()
	q.mu.Lock()
	q.closed = true
	q.mu.Unlock()
}
