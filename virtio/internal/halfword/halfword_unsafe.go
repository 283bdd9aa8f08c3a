package halfword

import (
	"sync/atomic"
	"unsafe"
)

// Field is a 16-bit field in memory that somebody else accesses at any time.
// The other half of its word belongs to somebody else and keeps its value.
type Field struct {
	word  *uint32
	shift uint32
}

// At returns the field at byte off of b, where b is Aligned and holds the
// whole word around it.
func At(b []byte, off int) Field {
	return Field{Word(b, off&^3), uint32(off&2) * 8}
}

// Word returns the 32-bit word at byte off of b, a multiple of 4, for use with
// sync/atomic.
func Word(b []byte, off int) *uint32 {
	b = b[off : off+4] // checked, and not read
	return (*uint32)(unsafe.Pointer(unsafe.SliceData(b)))
}

// Aligned reports whether the host address of b is a multiple of 4.
func Aligned(b []byte) bool { return uintptr(unsafe.Pointer(unsafe.SliceData(b)))&3 == 0 }

// Load reads the field; what is read after it is newer.
func (f Field) Load() uint16 { return uint16(atomic.LoadUint32(f.word) >> f.shift) }

// Store writes the field, and is a full barrier. It takes two steps rather
// than a compare-and-swap loop, which a peer that keeps changing the other
// half could hold up. In between the field reads 0, which is harmless where it
// is used: the indices at which the peer wants to be woken, written before the
// ring is looked at once more.
func (f Field) Store(v uint16) {
	atomic.AndUint32(f.word, ^(uint32(0xffff) << f.shift))
	atomic.OrUint32(f.word, uint32(v)<<f.shift)
}
