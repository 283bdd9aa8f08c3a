package virtio

import (
	"errors"
	"fmt"
	"sort"
)

// ErrOutOfRange says that a guest-physical range is not, or not wholly,
// guest memory.
var ErrOutOfRange = errors.New("virtio: address range outside guest memory")

// Region is a piece of guest memory: the guest-physical address of its first
// byte and the host bytes behind it. Bytes should start and end on an 8-byte
// boundary, as every page does.
type Region struct {
	Addr  uint64
	Bytes []byte
}

func (r Region) end() uint64 { return r.Addr + uint64(len(r.Bytes)) }

// Memory translates guest-physical addresses to host bytes. Every access is
// bounds-checked. A Memory never changes, so it is safe for concurrent use; the
// bytes themselves belong to the guest too and may change at any time.
type Memory struct {
	regions []Region // ascending, disjoint
}

// NewMemory builds the map from regions, in any order. It refuses regions
// that are empty, overlap, or wrap around the end of the address space.
func NewMemory(regions ...Region) (*Memory, error) {
	m := &Memory{regions: append([]Region(nil), regions...)}
	sort.Slice(m.regions, func(i, j int) bool { return m.regions[i].Addr < m.regions[j].Addr })
	for i, r := range m.regions {
		if len(r.Bytes) == 0 {
			return nil, fmt.Errorf("virtio: memory region at %#x is empty", r.Addr)
		}
		if r.end() < r.Addr {
			return nil, fmt.Errorf("virtio: memory region at %#x with %#x bytes wraps around the address space", r.Addr, len(r.Bytes))
		}
		if i > 0 && m.regions[i-1].end() > r.Addr {
			return nil, fmt.Errorf("virtio: memory regions at %#x and %#x overlap", m.regions[i-1].Addr, r.Addr)
		}
	}
	return m, nil
}

// Regions is a copy of the map, ascending by address.
func (m *Memory) Regions() []Region { return append([]Region(nil), m.regions...) }

// find returns the bytes from addr to the end of its region.
func (m *Memory) find(addr uint64) []byte {
	rs := m.regions
	for len(rs) > 4 { // few regions are scanned, many are halved first
		h := len(rs) / 2
		if rs[h].Addr <= addr {
			rs = rs[h:]
		} else {
			rs = rs[:h]
		}
	}
	for i := range rs {
		if off := addr - rs[i].Addr; addr >= rs[i].Addr && off < uint64(len(rs[i].Bytes)) {
			return rs[i].Bytes[off:]
		}
	}
	return nil
}

// Slice returns the n guest bytes at addr without copying. They must lie
// inside one region and n must not be 0; anything else is ErrOutOfRange.
func (m *Memory) Slice(addr, n uint64) ([]byte, error) {
	b := m.find(addr)
	if n == 0 || n > uint64(len(b)) {
		return nil, ErrOutOfRange
	}
	return b[:n:n], nil
}

// Read copies len(p) guest bytes at addr into p. The range may cross from one
// region into an adjacent one. On ErrOutOfRange p's content is undefined.
func (m *Memory) Read(addr uint64, p []byte) error {
	for len(p) > 0 {
		b := m.find(addr)
		if b == nil {
			return ErrOutOfRange
		}
		n := copy(p, b)
		p, addr = p[n:], addr+uint64(n)
	}
	return nil
}

// Write copies p to the guest memory at addr. The range may cross from one
// region into an adjacent one. Nothing is written when it is ErrOutOfRange.
func (m *Memory) Write(addr uint64, p []byte) error {
	for a, n := addr, uint64(len(p)); n > 0; {
		b := uint64(len(m.find(a)))
		if b == 0 {
			return ErrOutOfRange
		}
		b = min(b, n)
		a, n = a+b, n-b
	}
	for len(p) > 0 {
		n := copy(m.find(addr), p)
		p, addr = p[n:], addr+uint64(n)
	}
	return nil
}
