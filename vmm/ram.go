package vmm

import (
	"fmt"
	"sync"

	"github.com/moovm/moovm/virtio"
	"golang.org/x/sys/unix"
)

// ram is the guest's memory: one memory file, mapped in one or two pieces
// around the hole below 4 GiB. Pages exist once the guest touches them.
type ram struct {
	mu      sync.Mutex // fd
	fd      int
	regions []virtio.Region
	mem     *virtio.Memory
}

const hugePage = 2 << 20

func newRAM(size int64, huge bool) (_ *ram, err error) {
	if size < minMemory {
		return nil, fmt.Errorf("memory of %d bytes is too small: give at least %d MiB (a stock kernel wants 64 MiB or more)", size, minMemory>>20)
	}
	if size > maxMemory {
		return nil, fmt.Errorf("memory of %d bytes is too large: the most is %d GiB", size, maxMemory>>30)
	}
	if size%pageSize != 0 {
		return nil, fmt.Errorf("memory of %d bytes is not a multiple of %d", size, pageSize)
	}
	if huge && size%hugePage != 0 {
		return nil, fmt.Errorf("memory of %d bytes is not a multiple of a huge page (%d MiB)", size, hugePage>>20)
	}
	r := &ram{fd: -1}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	flags, mapping := unix.MFD_CLOEXEC, unix.MAP_SHARED|unix.MAP_NORESERVE
	if huge {
		// Huge pages are reserved when they are mapped: an empty pool is an
		// error then, not a SIGBUS later.
		flags, mapping = flags|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB, unix.MAP_SHARED
	}
	if r.fd, err = unix.MemfdCreate("moovm-ram", flags); err != nil {
		return nil, fmt.Errorf("guest memory: memfd_create: %w", err)
	}
	if err = unix.Ftruncate(r.fd, size); err != nil {
		return nil, fmt.Errorf("guest memory of %d bytes: %w", size, err)
	}
	low := min(size, addrHole)
	if err = r.add(0, 0, low, mapping); err != nil {
		return nil, err
	}
	if size > low {
		if err = r.add(addrAbove4G, low, size-low, mapping); err != nil {
			return nil, err
		}
	}
	if r.mem, err = virtio.NewMemory(r.regions...); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *ram) add(addr uint64, off, n int64, flags int) error {
	b, err := unix.Mmap(r.fd, off, int(n), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		if flags&unix.MAP_NORESERVE == 0 {
			return fmt.Errorf("guest memory: map %d bytes in huge pages: %w (reserve them first: sysctl vm.nr_hugepages=%d)", n, err, (n+hugePage-1)/hugePage)
		}
		return fmt.Errorf("guest memory: map %d bytes: %w", n, err)
	}
	// Best effort: guests stay out of core files, and where the host lets memory
	// files have huge pages (shmem_enabled: advise), they fault 512 times less.
	unix.Madvise(b, unix.MADV_DONTDUMP)
	unix.Madvise(b, unix.MADV_HUGEPAGE)
	r.regions = append(r.regions, virtio.Region{Addr: addr, Bytes: b})
	return nil
}

// low is the memory below the hole.
func (r *ram) low() []byte { return r.regions[0].Bytes }

// used is how many bytes of the memory exist.
func (r *ram) used() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	var st unix.Stat_t
	if r.fd < 0 || unix.Fstat(r.fd, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// Close unmaps the memory. Nothing may use it any more.
func (r *ram) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, reg := range r.regions {
		unix.Munmap(reg.Bytes)
	}
	r.regions = nil
	if r.fd >= 0 {
		unix.Close(r.fd)
		r.fd = -1
	}
}
