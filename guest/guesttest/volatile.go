package guesttest

import (
	"maps"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/moovm/moovm/virtioblk"
)

// volatileCache is a disk with a write cache that loses power: what was
// written since the last flush is kept here, sector by sector, and powerCut
// writes a random part of it to the disk and forgets the rest.
type volatileCache struct {
	disk virtioblk.Backend

	mu      sync.RWMutex
	pending map[int64][]byte // by sector
}

const sector = 512

func newVolatileCache(disk virtioblk.Backend) *volatileCache {
	return &volatileCache{disk: disk, pending: map[int64][]byte{}}
}

// ReadAt implements virtioblk.Backend.
func (v *volatileCache) ReadAt(p []byte, off int64) (int, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	n, err := v.disk.ReadAt(p, off)
	for i := 0; i < n && len(v.pending) > 0; {
		s, from := (off+int64(i))/sector, (off+int64(i))%sector
		room := min(n-i, int(sector-from))
		if b := v.pending[s]; b != nil {
			copy(p[i:i+room], b[from:])
		}
		i += room
	}
	return n, err
}

// WriteAt implements virtioblk.Backend; the device writes whole sectors.
func (v *volatileCache) WriteAt(p []byte, off int64) (int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if off%sector != 0 || len(p)%sector != 0 || off+int64(len(p)) > v.disk.Size() {
		return v.disk.WriteAt(p, off) // it knows what to say
	}
	for i := 0; i < len(p); i += sector {
		v.pending[(off+int64(i))/sector] = slices.Clone(p[i : i+sector])
	}
	return len(p), nil
}

// Flush implements virtioblk.Backend.
func (v *volatileCache) Flush() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.write(func() bool { return true }); err != nil {
		return err
	}
	return v.disk.Flush()
}

// Size implements virtioblk.Backend.
func (v *volatileCache) Size() int64 { return v.disk.Size() }

// powerCut writes some of what was not flushed, and loses the rest.
func (v *volatileCache) powerCut() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	chance := rand.Float64() // now most of it is lost, now hardly any
	return v.write(func() bool { return rand.Float64() < chance })
}

// write empties the cache, and writes the sectors that keep says.
func (v *volatileCache) write(keep func() bool) error {
	for s, b := range v.pending {
		if !keep() {
			continue
		}
		if _, err := v.disk.WriteAt(b, s*sector); err != nil {
			return err
		}
	}
	clear(v.pending)
	return nil
}

// copy is what is not flushed now.
func (v *volatileCache) copy() map[int64][]byte {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return maps.Clone(v.pending) // sectors are never written to, only replaced
}

// set makes pending what is not flushed.
func (v *volatileCache) set(pending map[int64][]byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.pending = maps.Clone(pending)
}
