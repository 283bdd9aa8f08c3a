package main

import (
	"fmt"
	"sync"
)

const sectorSize = 512

// numbers is a disk of a terabyte that takes no space: sector n holds the text
// "sector n" until it is written. These four methods are all a disk needs to be
// a virtioblk.Backend; see that interface for the optional ones.
type numbers struct {
	sectors int64
	mu      sync.RWMutex
	written map[int64][sectorSize]byte
}

// Size is the disk's size in bytes.
func (d *numbers) Size() int64 { return d.sectors * sectorSize }

// Flush has nothing to bring to stable storage.
func (d *numbers) Flush() error { return nil }

// ReadAt and WriteAt are called by many goroutines; the device has checked that
// the range is inside the disk and made of whole sectors.
func (d *numbers) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for i := 0; i < len(p); i += sectorSize {
		n := (off + int64(i)) / sectorSize
		s, ok := d.written[n]
		if !ok {
			copy(s[:], fmt.Sprintf("%-*s\n", sectorSize-1, fmt.Sprint("sector ", n)))
		}
		copy(p[i:], s[:])
	}
	return len(p), nil
}

func (d *numbers) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.written == nil {
		d.written = map[int64][sectorSize]byte{}
	}
	for i := 0; i < len(p); i += sectorSize {
		d.written[(off+int64(i))/sectorSize] = [sectorSize]byte(p[i:])
	}
	return len(p), nil
}
