package vhostuser

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/halfword"
)

// Layout of the in-flight region of a split queue: a header and an entry for
// each descriptor. It is memory shared with the front-end, which hands it to
// the next back-end when this one dies. Behind all queues, from a page boundary
// on, there is room for what the device itself must not forget (pendingSharer);
// the front-end knows the size of the whole and not what is in it.
const (
	inflightHeader = 16 // features 8, version 2, desc_num 2, last_batch_head 2, used_idx 2
	inflightEntry  = 16 // inflight 1, padding 5, next 2, counter 8
	inflightAlign  = 64

	offVersion = 8
	offDescNum = 10
	offLast    = 12
	offUsedIdx = 14
)

func inflightQueueSize(entries uint16) uint64 {
	return (inflightHeader + inflightEntry*uint64(entries) + inflightAlign - 1) &^ (inflightAlign - 1)
}

// inflight is the whole region.
type inflight struct {
	mapping []byte
	queues  [][]byte
	pending []byte // nil if there is no room for it
}

// pendingStart is where the part of the device begins.
func pendingStart(queues int, entries uint16) uint64 {
	return (uint64(queues)*inflightQueueSize(entries) + 0xfff) &^ 0xfff
}

// newInflight makes a region, with pending bytes for the device; fd is for the
// front-end and the caller's.
func newInflight(queues int, entries uint16, pending uint64) (fd int, size uint64, err error) {
	size = uint64(queues) * inflightQueueSize(entries)
	if pending > 0 {
		size = pendingStart(queues, entries) + pending
	}
	fd, err = unix.MemfdCreate("virtio-inflight", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, 0, fmt.Errorf("memfd for requests in flight: %w", err)
	}
	if err = unix.Ftruncate(fd, int64(size)); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		unix.Close(fd)
		return -1, 0, fmt.Errorf("memfd for requests in flight: %w", err)
	}
	return fd, size, nil
}

// openInflight maps a region; fd stays the caller's.
func openInflight(fd int, off, size uint64, queues int, entries uint16, pending uint64) (*inflight, error) {
	per := inflightQueueSize(entries)
	// What the device keeps there it uses with its locks held: memory that can
	// vanish is not for that. Seals come first, for the size they seal.
	seals, sealsErr := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	var st unix.Stat_t
	switch err := unix.Fstat(fd, &st); {
	case err != nil:
		return nil, err
	case off%4096 != 0 || off > 1<<40 || size > 1<<40 || size < uint64(queues)*per || off+size > uint64(st.Size):
		return nil, fmt.Errorf("region for requests in flight: %d bytes at %d do not hold %d queues of %d", size, off, queues, entries)
	}
	n, start := uint64(queues)*per, pendingStart(queues, entries)
	if pending > 0 && size >= start+pending && sealsErr == nil && seals&unix.F_SEAL_SHRINK != 0 {
		n = start + pending
	}
	m, err := unix.Mmap(fd, int64(off), int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("mapping the region for requests in flight: %w", err)
	}
	in := &inflight{mapping: m}
	if n > start {
		in.pending = m[start:n:n]
	}
	for i := range queues {
		in.queues = append(in.queues, m[uint64(i)*per:][:per:per])
	}
	return in, nil
}

func (in *inflight) close() {
	if in != nil && in.mapping != nil {
		unix.Munmap(in.mapping)
		in.mapping, in.queues, in.pending = nil, nil, nil
	}
}

// tracker writes down what one queue has in flight (virtio.Tracker). Other
// processes look at it only when this one is dead; then the order in which the
// stores below reached memory is what counts.
type tracker struct {
	b       []byte
	counter uint64 // Taken's
	head    *uint32
}

// resume reads what an earlier back-end has left: the requests to submit
// again, in their order, and where the available ring goes on. used is used.idx
// of the ring; size its number of descriptors, which the driver chose: if that does not fit
// it is an ErrQueueConfig. A region that was never used is initialized.
func resume(b []byte, size, used uint16) (t *tracker, heads []uint16, avail uint16, err error) {
	le := binary.LittleEndian
	if inflightQueueSize(size) > uint64(len(b)) {
		return nil, nil, 0, fmt.Errorf("%w: the region for requests in flight is too small for %d descriptors", virtio.ErrQueueConfig, size)
	}
	t = &tracker{b: b, head: halfword.Word(b, offLast)}
	switch v := le.Uint16(b[offVersion:]); {
	case v == 0:
		clear(b)
		le.PutUint16(b[offVersion:], 1)
		le.PutUint16(b[offDescNum:], size)
		t.store(0, used)
		return t, nil, used, nil
	case v != 1:
		return nil, nil, 0, fmt.Errorf("the region for requests in flight has version %d", v)
	case le.Uint16(b[offDescNum:]) != size:
		return nil, nil, 0, fmt.Errorf("%w: the region for requests in flight is for another queue size", virtio.ErrQueueConfig)
	}
	if le.Uint16(b[offUsedIdx:]) != used {
		// It died after it had put the last one into the used ring and
		// before it had written that down.
		if last := le.Uint16(b[offLast:]); last < size {
			t.entry(last)[0] = 0
		}
	}
	t.store(le.Uint16(b[offLast:]), used)
	for h := range size {
		if e := t.entry(h); e[0] != 0 {
			heads = append(heads, h)
			t.counter = max(t.counter, le.Uint64(e[8:])+1)
		}
	}
	slices.SortStableFunc(heads, func(a, b uint16) int {
		return cmp.Compare(le.Uint64(t.entry(a)[8:]), le.Uint64(t.entry(b)[8:]))
	})
	return t, heads, used + uint16(len(heads)), nil
}

func (t *tracker) entry(h uint16) []byte {
	return t.b[inflightHeader+inflightEntry*int(h):][:inflightEntry]
}

// store writes last_batch_head and used_idx in one step.
func (t *tracker) store(last, used uint16) {
	atomic.StoreUint32(t.head, uint32(last)|uint32(used)<<16)
}

// state is the word of an entry that holds its inflight byte.
func (t *tracker) state(h uint16) *uint32 {
	return halfword.Word(t.b, inflightHeader+inflightEntry*int(h))
}

// Taken implements virtio.Tracker.
func (t *tracker) Taken(h uint16) {
	binary.LittleEndian.PutUint64(t.entry(h)[8:], t.counter)
	t.counter++
	atomic.StoreUint32(t.state(h), 1)
}

// Returning implements virtio.Tracker.
func (t *tracker) Returning(h uint16) {
	t.store(h, uint16(atomic.LoadUint32(t.head)>>16))
}

// Returned implements virtio.Tracker.
func (t *tracker) Returned(h, used uint16) {
	atomic.StoreUint32(t.state(h), 0)
	t.store(h, used)
}
