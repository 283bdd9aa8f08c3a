package vmm

import (
	"errors"
	"fmt"
	"sync"

	"github.com/moovm/moovm/virtio"
	"golang.org/x/sys/unix"
)

// ram is the guest's memory, mapped in one or two pieces around the hole below
// 4 GiB. Pages exist once the guest touches them.
//
//	newRAM ─▶ shared ── freeze ──▶ private ── freeze ──▶ private
//	          (a memory file)      (an image)  ▲    │
//	            reserveRAM ─────── show ───────┘ ◀──┘ rewind
//
// From its first freeze on the memory is private: the memory file belongs to
// the image then, and what the machine writes to the machine. Where a piece is
// mapped never changes, as KVM's slots and the devices hold its address.
type ram struct {
	size    int64
	huge    bool
	regions []virtio.Region
	offsets []int64 // of the regions in the file or image
	mem     *virtio.Memory

	mu    sync.Mutex // what follows
	fd    int        // the memory file while it is shared, else -1
	image *image     // what the private mappings show

	later   sync.WaitGroup // the sealing of a frozen file
	sealErr error          // of the last one; read after later.Wait
}

const hugePage = 2 << 20

// newRAM makes the memory of a machine that boots: zeros.
func newRAM(size int64, huge bool) (_ *ram, err error) {
	if err := checkMemory(size, huge); err != nil {
		return nil, err
	}
	r := &ram{fd: -1, size: size, huge: huge}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	if r.fd, err = memfd("moovm-ram", huge); err != nil {
		return nil, fmt.Errorf("guest memory: memfd_create: %w", err)
	}
	if err = unix.Ftruncate(r.fd, size); err != nil {
		return nil, fmt.Errorf("guest memory of %d bytes: %w", size, err)
	}
	return r, r.place(r.mapShared)
}

// reserveRAM takes the address space of a memory, for show to map an image
// into.
func reserveRAM(size int64) (_ *ram, err error) {
	if err := checkMemory(size, false); err != nil {
		return nil, err
	}
	r := &ram{fd: -1, size: size}
	if err := r.place(func(_, n int64) ([]byte, error) { return reserve(n) }); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

func checkMemory(size int64, huge bool) error {
	switch {
	case size < minMemory:
		return fmt.Errorf("memory of %d bytes is too small: give at least %d MiB (a stock kernel wants 64 MiB or more)", size, minMemory>>20)
	case size > maxMemory:
		return fmt.Errorf("memory of %d bytes is too large: the most is %d GiB", size, maxMemory>>30)
	case size%pageSize != 0:
		return fmt.Errorf("memory of %d bytes is not a multiple of %d", size, pageSize)
	case huge && size%hugePage != 0:
		return fmt.Errorf("memory of %d bytes is not a multiple of a huge page (%d MiB)", size, hugePage>>20)
	}
	return nil
}

// place maps the pieces around the hole by f, which gets their place in the
// file and their length.
func (r *ram) place(f func(off, n int64) ([]byte, error)) error {
	low := min(r.size, addrHole)
	for _, p := range []struct {
		addr   uint64
		off, n int64
	}{{0, 0, low}, {addrAbove4G, low, r.size - low}} {
		if p.n == 0 {
			continue
		}
		b, err := f(p.off, p.n)
		if err != nil {
			return fmt.Errorf("guest memory: map %d bytes %w", p.n, err)
		}
		r.regions = append(r.regions, virtio.Region{Addr: p.addr, Bytes: b})
		r.offsets = append(r.offsets, p.off)
	}
	var err error
	r.mem, err = virtio.NewMemory(r.regions...)
	return err
}

func (r *ram) mapShared(off, n int64) ([]byte, error) {
	flags := unix.MAP_SHARED | mapNoReserve
	if r.huge {
		// Huge pages are reserved when they are mapped: an empty pool is an
		// error then, not a SIGBUS later.
		flags = unix.MAP_SHARED
	}
	b, err := unix.Mmap(r.fd, off, int(n), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil && r.huge {
		return nil, fmt.Errorf("in huge pages: %w (reserve them first: sysctl vm.nr_hugepages=%d)", err, (n+hugePage-1)/hugePage)
	}
	if err == nil {
		advise(b)
	}
	return b, err
}

// low is the memory below the hole.
func (r *ram) low() []byte { return r.regions[0].Bytes }

// errFrozenHuge refuses to freeze memory whose copies would come out of the
// host's pool, 2 MiB for every page written.
var errFrozenHuge = errors.New("guest memory in huge pages of the host's pool cannot be frozen: make the machine without HugePages")

// freeze returns what the memory holds now, as an image for the caller to
// release. Nothing may use the memory meanwhile. Afterwards the machine can go
// on, and nobody else sees what it writes.
func (r *ram) freeze() (*image, error) {
	if r.huge {
		return nil, errFrozenHuge
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd >= 0 {
		return r.freezeFile()
	}
	return r.freezePrivate()
}

// freezeFile makes an image of the memory file, and the mappings private; r.mu
// is held. After an error the machine cannot go on.
func (r *ram) freezeFile() (*image, error) {
	f := &memFile{fd: r.fd}
	segments, err := fileSegments(f, r.size)
	if err != nil {
		return nil, err
	}
	r.fd = -1
	f.refs.Store(1) // this function's
	defer f.release()
	im := newImage(r.size, segments)
	away := make([]uintptr, len(r.regions))
	for i, reg := range r.regions {
		away[i] = moveAway(reg.Bytes)
	}
	err = r.showLocked(im)
	// Unmapping takes as long as there are pages; it can wait. That the file
	// can be sealed then proves that nobody writes to it any more.
	f.refs.Add(1)
	r.later.Go(func() {
		defer f.release()
		for i, reg := range r.regions {
			if away[i] != 0 {
				unmapAt(away[i], len(reg.Bytes))
			}
		}
		r.sealErr = f.seal()
	})
	if err != nil {
		return nil, errors.Join(err, im.release())
	}
	return im, nil
}

// show maps an image in the place of what the memory shows now. Nothing may
// use the memory meanwhile.
func (r *ram) show(im *image) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.showLocked(im)
}

func (r *ram) showLocked(im *image) error {
	if im.size != r.size {
		return fmt.Errorf("guest memory of %d bytes cannot show an image of %d", r.size, im.size)
	}
	for i, reg := range r.regions {
		if err := remap(reg.Bytes, r.offsets[i], im.slice(r.offsets[i], int64(len(reg.Bytes)))); err != nil {
			return fmt.Errorf("guest memory: map an image: %w", err)
		}
	}
	if r.image != nil {
		r.image.release() // closes files that nobody maps any more
	}
	r.image = im.retain()
	return nil
}

// rewind makes the memory what the image says. For the image that it shows
// already this costs as much as there are pages to throw away.
func (r *ram) rewind(im *image) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.image != im {
		return r.showLocked(im)
	}
	for _, reg := range r.regions {
		if err := unix.Madvise(reg.Bytes, unix.MADV_DONTNEED); err != nil {
			return fmt.Errorf("guest memory: rewind: %w", err)
		}
	}
	return nil
}

// used is how many bytes of the memory exist: of a private one, what it does
// not share with its image.
func (r *ram) used() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fd < 0 {
		var n int64
		for _, s := range r.private() {
			n += s.length
		}
		return n
	}
	var st unix.Stat_t
	if unix.Fstat(r.fd, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

// Close unmaps the memory. Nothing may use it any more. It is idempotent.
func (r *ram) Close() {
	r.later.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, reg := range r.regions {
		unix.Munmap(reg.Bytes)
	}
	r.regions = nil
	if r.image != nil {
		r.image.release()
		r.image = nil
	}
	if r.fd >= 0 {
		unix.Close(r.fd)
		r.fd = -1
	}
}
