package virtio_test

import (
	"bytes"
	"errors"
	"math"
	"testing"

	"github.com/moovm/moovm/virtio"
)

func TestMemoryRefusesBadMaps(t *testing.T) {
	b := make([]byte, 4096)
	for name, rs := range map[string][]virtio.Region{
		"empty":     {{Addr: 0}},
		"overlap":   {{Addr: 0x1000, Bytes: b}, {Addr: 0x1fff, Bytes: b}},
		"contained": {{Addr: 0x1000, Bytes: b}, {Addr: 0x1800, Bytes: b[:8]}},
		"wrap":      {{Addr: math.MaxUint64 - 100, Bytes: b}},
	} {
		if _, err := virtio.NewMemory(rs...); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// manyRegions is a map with holes and neighbours, more than find scans.
func manyRegions(t *testing.T, n int) *virtio.Memory {
	t.Helper()
	var rs []virtio.Region
	for i := n - 1; i >= 0; i-- { // given in descending order
		b := bytes.Repeat([]byte{byte(i)}, 4096)
		rs = append(rs, virtio.Region{Addr: uint64(0x10000 + i*4096 + i/2*4096), Bytes: b})
	}
	m, err := virtio.NewMemory(rs...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestMemorySliceStaysInsideOneRegion(t *testing.T) {
	for _, n := range []int{1, 2, 4, 5, 9, 32} {
		m := manyRegions(t, n)
		for i, r := range m.Regions() {
			if b, err := m.Slice(r.Addr, 4096); err != nil || b[0] != byte(i) || cap(b) != 4096 {
				t.Fatalf("%d regions: region %d: %v", n, i, err)
			}
			if b, err := m.Slice(r.Addr+4095, 1); err != nil || b[0] != byte(i) || cap(b) != 1 {
				t.Fatalf("%d regions: last byte of region %d: %v", n, i, err)
			}
			for _, bad := range [][2]uint64{
				{r.Addr, 4097}, {r.Addr + 4095, 2}, {r.Addr, 0}, {r.Addr, math.MaxUint64},
				{r.Addr + 1, math.MaxUint64 - r.Addr}, {math.MaxUint64, 1}, {math.MaxUint64, 2}, {0, 1}, {0xffff, 2},
			} {
				if _, err := m.Slice(bad[0], bad[1]); !errors.Is(err, virtio.ErrOutOfRange) {
					t.Errorf("%d regions: Slice(%#x, %#x) = %v", n, bad[0], bad[1], err)
				}
			}
		}
	}
}

func TestMemoryReadWriteCrossAdjacentRegions(t *testing.T) {
	m := manyRegions(t, 4) // 0 and 1 adjacent, a hole, 2 and 3 adjacent
	p := bytes.Repeat([]byte{0xaa}, 8)
	if err := m.Write(0x10000+4092, p); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 10)
	if err := m.Read(0x10000+4091, got); err != nil || got[0] != 0 || !bytes.Equal(got[1:9], p) || got[9] != 1 {
		t.Fatalf("got %x, %v", got, err)
	}
	if err := m.Write(0x10000+8190, p); !errors.Is(err, virtio.ErrOutOfRange) {
		t.Errorf("write into a hole: %v", err)
	}
	if b, _ := m.Slice(0x10000+8190, 2); b[0] != 1 {
		t.Error("a write that does not fit wrote something")
	}
	if err := m.Read(0x10000+8190, got); !errors.Is(err, virtio.ErrOutOfRange) {
		t.Errorf("read into a hole: %v", err)
	}
}
