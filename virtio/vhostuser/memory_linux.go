package vhostuser

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/internal/vhostmsg"
)

// maxSlots is how many memory regions a front-end may give us.
const maxSlots = 64

// region is a mapped memory region.
type region struct {
	vhostmsg.Region
	mapping []byte
	bytes   []byte // of the region, inside mapping
}

// mapRegion maps what the front-end describes. fd stays the caller's.
func mapRegion(r vhostmsg.Region, fd int) (*region, error) {
	total := r.Size + r.Offset
	switch {
	case r.Size == 0 || total < r.Size || total > 1<<46 || r.Guest+r.Size < r.Guest || r.User+r.Size < r.User:
		return nil, fmt.Errorf("memory region %#x+%#x at offset %#x is empty or too large", r.Guest, r.Size, r.Offset)
	case (r.Guest|r.Size|r.Offset)%4096 != 0:
		return nil, fmt.Errorf("memory region %#x+%#x at offset %#x is not made of pages", r.Guest, r.Size, r.Offset)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("memory region descriptor: %w", err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFREG && uint64(st.Size) < total {
		return nil, fmt.Errorf("memory region %#x+%#x at offset %#x is beyond the end of its file (%#x bytes)", r.Guest, r.Size, r.Offset, st.Size)
	}
	// From offset 0 and in whole blocks, which is what huge pages want.
	n := total
	if bs := uint64(st.Blksize); bs > 4096 && bs <= 1<<30 && bs&(bs-1) == 0 {
		n = (n + bs - 1) &^ (bs - 1)
	}
	m, err := unix.Mmap(fd, 0, int(n), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("mapping memory region %#x+%#x: %w", r.Guest, r.Size, err)
	}
	return &region{r, m, m[r.Offset:total:total]}, nil
}

func (r *region) unmap() {
	if r.mapping != nil {
		unix.Munmap(r.mapping)
		r.mapping, r.bytes = nil, nil
	}
}

// memory is the table of regions.
type memory struct {
	regions []*region
	mem     *virtio.Memory // nil if there are none
}

// replace installs a new list of regions; the old list stays on an error.
func (m *memory) replace(regions []*region) error {
	rs := make([]virtio.Region, 0, len(regions))
	for _, r := range regions {
		rs = append(rs, virtio.Region{Addr: r.Guest, Bytes: r.bytes})
	}
	mem, err := virtio.NewMemory(rs...)
	if err != nil {
		return err
	}
	m.regions, m.mem = regions, mem
	return nil
}

// guest translates an address of the front-end's to a guest-physical one.
func (m *memory) guest(user uint64) (uint64, error) {
	for _, r := range m.regions {
		if off := user - r.User; user >= r.User && off < r.Size {
			return r.Guest + off, nil
		}
	}
	return 0, fmt.Errorf("address %#x is in no memory region", user)
}

func (m *memory) close() {
	for _, r := range m.regions {
		r.unmap()
	}
	m.regions, m.mem = nil, nil
}

// setMemTable replaces all regions.
func (s *session) setMemTable(m *vhostmsg.Message) error {
	n := int(binary.LittleEndian.Uint32(m.Payload))
	if n > vhostmsg.MaxFDs || len(m.Payload) < 8+n*vhostmsg.RegionSize {
		return bad("%d memory regions in %d bytes", n, len(m.Payload))
	}
	if len(m.FDs) != n {
		return bad("%d descriptors, want %d", len(m.FDs), n)
	}
	var next memory
	for i := range n {
		r, err := mapRegion(vhostmsg.ParseRegion(m.Payload[8+i*vhostmsg.RegionSize:]), m.FDs[i])
		if err != nil {
			next.close()
			return err
		}
		next.regions = append(next.regions, r)
	}
	if err := next.replace(next.regions); err != nil {
		next.close()
		return err
	}
	if n == 0 {
		next.mem = nil
	}
	resume, err := s.pause()
	if err != nil {
		next.close()
		return err
	}
	s.mem.close()
	s.mem = next
	return resume()
}

// addMemReg adds a region.
func (s *session) addMemReg(m *vhostmsg.Message) error {
	if len(s.mem.regions) >= maxSlots {
		return bad("more than %d memory regions", maxSlots)
	}
	r, err := mapRegion(vhostmsg.ParseRegion(m.Payload[8:]), m.FDs[0])
	if err != nil {
		return err
	}
	resume, err := s.pause()
	if err != nil {
		r.unmap()
		return err
	}
	list := append(append([]*region(nil), s.mem.regions...), r)
	if err := s.mem.replace(list); err != nil {
		r.unmap()
		return err
	}
	return resume()
}

// remMemReg takes a region away.
func (s *session) remMemReg(m *vhostmsg.Message) error {
	d := vhostmsg.ParseRegion(m.Payload[8:])
	for i, r := range s.mem.regions {
		if r.Guest != d.Guest || r.Size != d.Size || r.User != d.User {
			continue
		}
		resume, err := s.pause()
		if err != nil {
			return err
		}
		list := append(append([]*region(nil), s.mem.regions[:i]...), s.mem.regions[i+1:]...)
		if err := s.mem.replace(list); err != nil {
			return err
		}
		if len(list) == 0 {
			s.mem.mem = nil
		}
		r.unmap()
		return resume()
	}
	return bad("no memory region %#x+%#x", d.Guest, d.Size)
}
