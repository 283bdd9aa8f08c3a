package virtionet

import "sync"

// buffer holds the packets that wait for a receive queue, up to a number of
// bytes. Any goroutine pushes; one peeks and pops, and what it has peeked at
// stays in place until then.
type buffer struct {
	ready chan struct{} // has room for one; something was pushed to an empty buffer

	mu   sync.Mutex
	mem  []byte // records of a 4-byte length and the packet
	r, w int    // offsets of the first record and behind the last
	n    int    // records
}

const (
	bufferSize = 1 << 20
	recordHead = 4
	recordSkip = 0xffffffff // the next record is at offset 0
)

func newBuffer(size int) *buffer {
	return &buffer{ready: make(chan struct{}, 1), mem: make([]byte, size)}
}

// push appends a packet: h and what is behind the header of packet. It reports
// false if there is no room.
func (b *buffer) push(h *header, packet []byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	need := recordHead + len(packet)
	if !b.room(need) {
		return false
	}
	le.PutUint32(b.mem[b.w:], uint32(len(packet)))
	rec := b.mem[b.w+recordHead : b.w+need]
	copy(rec, h[:])
	copy(rec[HeaderSize:], packet[HeaderSize:])
	b.w += need
	b.n++
	if b.n == 1 {
		select {
		case b.ready <- struct{}{}:
		default:
		}
	}
	return true
}

// room puts w where a record of need bytes fits; mu is held.
func (b *buffer) room(need int) bool {
	if b.n == 0 {
		b.r, b.w = 0, 0
	}
	if b.n > 0 && b.w <= b.r {
		return need <= b.r-b.w
	}
	if need <= len(b.mem)-b.w {
		return true
	}
	if need > b.r {
		return false
	}
	if len(b.mem)-b.w >= recordHead {
		le.PutUint32(b.mem[b.w:], recordSkip)
	}
	b.w = 0
	return true
}

// peek returns the first packet; nil if there is none.
func (b *buffer) peek() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.n == 0 {
		return nil
	}
	if len(b.mem)-b.r < recordHead || le.Uint32(b.mem[b.r:]) == recordSkip {
		b.r = 0
	}
	n := int(le.Uint32(b.mem[b.r:]))
	return b.mem[b.r+recordHead:][:n:n]
}

// pop removes the packet that peek returned.
func (b *buffer) pop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.r += recordHead + int(le.Uint32(b.mem[b.r:]))
	b.n--
}

// reset empties the buffer, while nobody peeks.
func (b *buffer) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.n = 0
}
