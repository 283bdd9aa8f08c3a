package virtiotest

import (
	"fmt"

	"github.com/moovm/moovm/virtio"
)

// GuestBase is the guest-physical address where the memory of NewGuest begins.
const GuestBase = 0x10000

// Guest is guest memory with a bump allocator for what a driver puts there.
type Guest struct {
	Memory *virtio.Memory
	Bytes  []byte // all of it; Bytes[0] is at GuestBase
	next   uint64
}

// NewGuest returns a guest with size bytes of memory, rounded up to pages.
func NewGuest(size int) *Guest { return NewGuestOn(make([]byte, (size+0xfff)&^0xfff)) }

// NewGuestOn returns a guest whose memory is b.
func NewGuestOn(b []byte) *Guest {
	m, err := virtio.NewMemory(virtio.Region{Addr: GuestBase, Bytes: b})
	if err != nil {
		panic(err) // b is empty
	}
	return &Guest{Memory: m, Bytes: b, next: GuestBase}
}

// Alloc returns n bytes at an address that is a multiple of align, a power of
// two. It panics when the guest's memory is used up: the test is wrong.
func (g *Guest) Alloc(n, align uint64) (addr uint64, b []byte) {
	addr = (g.next + align - 1) &^ (align - 1)
	b, err := g.Memory.Slice(addr, n)
	if err != nil {
		panic(fmt.Sprintf("virtiotest: no %d bytes left in a guest of %d", n, len(g.Bytes)))
	}
	g.next = addr + n
	return addr, b
}
