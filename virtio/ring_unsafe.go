package virtio

import (
	"sync/atomic"
	"unsafe"
)

// halfword is a 16-bit ring field that both sides access at any time. Go has
// no 16-bit atomics, so it is reached through the aligned 32-bit word around
// it; the other half belongs to somebody else and keeps its value.
type halfword struct {
	word  *uint32
	shift uint32
}

// newHalfword returns the field at byte off of b, where b is 4-byte aligned
// and holds the whole word around it.
func newHalfword(b []byte, off int) halfword {
	w := off &^ 3
	_ = b[w+3]
	return halfword{(*uint32)(unsafe.Pointer(&b[w])), uint32(off&2) * 8}
}

func (h halfword) load() uint16 { return uint16(atomic.LoadUint32(h.word) >> h.shift) }

// store takes two steps rather than a compare-and-swap loop, which a driver
// that keeps changing the other half could hold up. In between the field
// reads 0, which is harmless where it is used (avail_event, before avail.idx
// is looked at again). It is a full barrier.
func (h halfword) store(v uint16) {
	atomic.AndUint32(h.word, ^(uint32(0xffff) << h.shift))
	atomic.OrUint32(h.word, uint32(v)<<h.shift)
}

// aligned reports whether the host address of b is a multiple of 4.
func aligned(b []byte) bool { return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&3 == 0 }
