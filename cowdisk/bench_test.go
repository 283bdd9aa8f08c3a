package cowdisk

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

const benchSize = 64 << 20

func benchDisk(b *testing.B, touch bool) *Disk {
	dir := b.TempDir()
	base := filepath.Join(dir, "base.img")
	if err := os.WriteFile(base, randomBytes(benchSize, 1), 0o644); err != nil {
		b.Fatal(err)
	}
	img := filepath.Join(dir, "a.cow")
	mustCreate(b, img, CreateOptions{Backing: "base.img"})
	d := mustOpen(b, img, Options{})
	if touch {
		if _, err := d.WriteAt(make([]byte, benchSize), 0); err != nil {
			b.Fatal(err)
		}
		if err := d.Flush(); err != nil {
			b.Fatal(err)
		}
	}
	return d
}

func BenchmarkReadAllocated(b *testing.B)    { benchRead(b, benchDisk(b, true)) }
func BenchmarkReadBacking(b *testing.B)      { benchRead(b, benchDisk(b, false)) }
func BenchmarkWriteSecondTouch(b *testing.B) { benchWrite(b, benchDisk(b, true)) }

func benchRead(b *testing.B, d *Disk) {
	p := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.ReadAt(p, rand.Int64N(benchSize/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

func benchWrite(b *testing.B, d *Disk) {
	p := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := d.WriteAt(p, rand.Int64N(benchSize/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkReadRaw is the limit: the file and nothing else.
func BenchmarkReadRaw(b *testing.B) {
	f, err := HostFS{}.Open(benchDisk(b, false).chain.layers[1].real, OpenMode{})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 4096)
	for b.Loop() {
		if _, err := f.ReadAt(p, rand.Int64N(benchSize/4096)*4096); err != nil {
			b.Fatal(err)
		}
	}
}

// No operation allocates memory.
func TestNoAllocations(t *testing.T) {
	dir := t.TempDir()
	baseFile(t, dir, 8<<20)
	img := filepath.Join(dir, "a.cow")
	mustCreate(t, img, CreateOptions{Backing: "base.img"})
	d := mustOpen(t, img, Options{})
	p := make([]byte, 8192)
	bufs := [][]byte{p[:1000], p[1000:5000], p[5000:]}
	d.WriteAt(p, 0)
	next := int64(1 << 20)
	for name, f := range map[string]func() error{
		"read allocated":   func() error { _, err := d.ReadAt(p, 0); return err },
		"read backing":     func() error { _, err := d.ReadAt(p, 65536); return err },
		"read mixed":       func() error { _, err := d.ReadAt(p, 4096); return err },
		"readv mixed":      func() error { _, err := d.ReadvAt(bufs, 4096); return err },
		"write":            func() error { _, err := d.WriteAt(p, 0); return err },
		"writev":           func() error { _, err := d.WritevAt(bufs, 0); return err },
		"first write":      func() error { next += 8192; _, err := d.WriteAt(p, next); return err },
		"first writev":     func() error { next += 8192; _, err := d.WritevAt(bufs, next); return err },
		"unaligned writev": func() error { next += 16384; _, err := d.WritevAt(bufs, next+700); return err },
		"discard":          func() error { next += 8192; return d.Discard(next, 8192) },
		"flush":            func() error { return d.Flush() },
		"write and flush":  func() error { next += 8192; d.WriteAt(p, next); return d.Flush() },
	} {
		if raceEnabled {
			break // the race detector's pools forget
		}
		if n := testing.AllocsPerRun(50, func() {
			if err := f(); err != nil {
				t.Fatal(err)
			}
		}); n >= 1 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// nullFile answers at once: what is left is the package's own time.
type nullFile struct{ File }

func (nullFile) ReadAt(p []byte, off int64) (int, error)  { return len(p), nil }
func (nullFile) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }

// BenchmarkOverhead is what cowdisk adds to a system call.
func BenchmarkOverhead(b *testing.B) {
	d := benchDisk(b, true)
	p := make([]byte, 4096)
	real := d.chain.layers[0].file
	d.ReadAt(p, 0)
	for off := int64(0); off < benchSize; off += 1 << 20 {
		d.ReadAt(p, off)
	}
	d.chain.layers[0].file = nullFile{real}
	defer func() { d.chain.layers[0].file = real }()
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			d.ReadAt(p, 40960)
		}
	})
	b.Run("write", func(b *testing.B) {
		for b.Loop() {
			d.WriteAt(p, 40960)
		}
	})
}
