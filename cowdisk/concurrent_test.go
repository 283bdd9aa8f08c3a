package cowdisk

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// Many writers each own every eighth sector: they meet in the same units, bitmap bytes and words all the time, and nobody may undo what
// another one wrote.
func TestConcurrentNeighbours(t *testing.T) {
	for _, v := range []Variant{QEMUV2, UMLV3} {
		dir := t.TempDir()
		const size = 2 << 20
		_, want := baseFile(t, dir, size)
		img := filepath.Join(dir, "a.cow")
		mustCreate(t, img, CreateOptions{Backing: "base.img", Variant: v})
		d := mustOpen(t, img, Options{})
		const writers = 8
		stop := make(chan struct{})
		var side, wg sync.WaitGroup
		errs := make(chan error, 100)
		for i := range 2 {
			side.Go(func() { // a reader and a flusher, all the while
				p := make([]byte, 65536)
				r := rand.New(rand.NewPCG(uint64(i), 5))
				for {
					select {
					case <-stop:
						return
					default:
					}
					if _, err := d.ReadAt(p, r.Int64N(size-65536)); err != nil {
						errs <- err
					}
					if i == 0 {
						if err := d.Flush(); err != nil {
							errs <- err
						}
					}
				}
			})
		}
		for w := range writers {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), 6))
				for _, s := range r.Perm(size / 512 / writers) {
					off := (s*writers + w) * 512
					p := want[off : off+512 : off+512] // this writer's alone
					if r.IntN(3) == 0 {
						clear(p)
						if err := d.Discard(int64(off), 512); err != nil {
							errs <- err
						}
						continue
					}
					for i := range p {
						p[i] = byte(w + s + i)
					}
					if _, err := d.WriteAt(p, int64(off)); err != nil {
						errs <- err
					}
					q := make([]byte, 512)
					if _, err := d.ReadAt(q, int64(off)); err != nil || !bytes.Equal(p, q) {
						errs <- fmt.Errorf("sector %d: what was written is not there: %v", off/512, err)
					}
				}
			})
		}
		wg.Wait()
		close(stop)
		side.Wait()
		select {
		case err := <-errs:
			t.Fatal(err)
		default:
		}
		wantSame(t, "live", contents(t, d), want)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = mustOpen(t, img, Options{})
		wantSame(t, "reopened", contents(t, d), want)
		d.Close()
	}
}

// One pass serves all flushes that wait, and each of them covers what was written before it.
func TestGroupFlush(t *testing.T) {
	m := newMemFS()
	if err := Create("/d/img", CreateOptions{Size: 64 << 20, FS: m}); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, "/d/img", Options{FS: m})
	var syncs atomic.Int64
	m.fault = func(op string, n int) (int, error) {
		if op == "sync" {
			syncs.Add(1)
			time.Sleep(2 * time.Millisecond)
		}
		return n, nil
	}
	const flushes = 64
	var wg sync.WaitGroup
	for i := range flushes {
		wg.Go(func() {
			if _, err := d.WriteAt(make([]byte, 4096), int64(i)*4096); err != nil {
				t.Error(err)
			}
			if err := d.Flush(); err != nil {
				t.Error(err)
			}
			// The bit is in the file's durable part.
			m.mu.Lock()
			var b [1]byte
			m.nodes["/d/img"].dur.read(b[:], 1056+int64(i))
			m.mu.Unlock()
			if b[0] != 0xff {
				t.Errorf("flush %d returned before its write was durable", i)
			}
		})
	}
	wg.Wait()
	if n := syncs.Load(); n >= flushes {
		t.Errorf("%d flushes at the same time cost %d syncs", flushes, n)
	}
}

// Pages of the bitmap come and go while writers, readers and flushes use them; memory stays bounded.
func TestBitmapMemory(t *testing.T) {
	m := newMemFS()
	const size = 4 << 30 // 256 pages
	if err := Create("/d/img", CreateOptions{Size: size, FS: m}); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, "/d/img", Options{FS: m, BitmapMemory: 1}) // 16 pages
	var wg sync.WaitGroup
	var mu sync.Mutex
	written := map[int64]byte{}
	for w := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			p, q := make([]byte, 512), make([]byte, 512)
			for i := range 1000 {
				off := (r.Int64N(size/4096/4)*4 + int64(w)) * 4096 // this writer's alone
				p[0], p[511] = byte(i|1), byte(w)
				if _, err := d.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				mu.Lock()
				written[off] = p[0]
				mu.Unlock()
				if _, err := d.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
					t.Errorf("offset %d: %v", off, err)
				}
				if i%100 == 0 {
					if err := d.Flush(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	check := func(d *Disk) {
		t.Helper()
		for off, b := range written {
			var q [1]byte
			if _, err := d.ReadAt(q[:], off); err != nil || q[0] != b {
				t.Fatalf("offset %d: %d, want %d, %v", off, q[0], b, err)
			}
		}
		if n := d.Allocated(); n != int64(len(written))*8 {
			t.Fatalf("%d sectors allocated, want %d", n, len(written)*8)
		}
		if n := len(d.chain.layers[0].bm.resident); n > 64 {
			t.Fatalf("%d pages in memory", n)
		}
	}
	check(d)
	d.Close()
	d = mustOpen(t, "/d/img", Options{FS: m, BitmapMemory: 1})
	check(d)
}

// 16 TiB: the last sector works, memory does not follow the size, and discarding all of it is no work.
func TestHugeDisk(t *testing.T) {
	m := newMemFS()
	for _, v := range []Variant{QEMUV2, UMLV3} {
		const size = 16 << 40
		img := "/d/" + v.String()
		m.put("/d/base", randomBytes(100000, 1), 50)
		if err := Create(img, CreateOptions{Size: size, Backing: "base", Variant: v, FS: m}); err != nil {
			t.Fatal(err)
		}
		d := mustOpen(t, img, Options{FS: m})
		for _, off := range []int64{size - 4096, size / 2, 5<<40 + 512, 8<<40 - 100, 0} {
			p := randomBytes(4096, uint64(off))
			if _, err := d.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			q := make([]byte, 4096)
			if _, err := d.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
				t.Fatalf("offset %d: %v", off, err)
			}
		}
		if _, err := d.WriteAt([]byte{1}, size); !errors.Is(err, ErrRange) {
			t.Fatal(err)
		}
		if n := d.Allocated(); n != 6*8 {
			t.Errorf("%d sectors allocated", n)
		}
		var total, count int64
		if err := d.Extents(t.Context(), 0, size, func(e Extent) error { total += e.Length; count++; return nil }); err != nil || total != size || count > 16 {
			t.Errorf("%d extents of %d bytes: %v", count, total, err)
		}
		if err := d.Discard(0, size); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = mustOpen(t, img, Options{FS: m})
		q := make([]byte, 100000)
		if _, err := d.ReadAt(q, 0); err != nil || !isZero(q) {
			t.Errorf("discarded, but not zero: %v", err)
		}
		if n := len(m.nodes[img].cur.pages); n > 100 {
			t.Errorf("%d pages in the file", n)
		}
		d.Close()
	}
}

// Opening 1 TiB with nothing allocated takes little memory.
func TestOpenMemory(t *testing.T) {
	dir := t.TempDir()
	img := filepath.Join(dir, "a.cow")
	mustCreate(t, img, CreateOptions{Size: 1 << 40})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	d, err := Open(img, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	p := make([]byte, 4096)
	for off := int64(0); off < 1<<40; off += 1 << 33 { // touch everything once
		if _, err := d.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("%d bytes", n)
	}
}

// A request costs no more calls than it has runs, however many buffers it has.
func TestCallsPerRun(t *testing.T) {
	m := newMemFS()
	m.put("/d/base", randomBytes(1<<20, 1), 50)
	if err := Create("/d/img", CreateOptions{Backing: "base", FS: m}); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, "/d/img", Options{FS: m})
	d.ReadAt(make([]byte, 1), 0) // the bitmap page is there
	d.WriteAt(make([]byte, 16384), 32768)
	d.WriteAt(make([]byte, 4096), 0) // the page may have come again
	var reads, writes, others int
	m.fault = func(op string, n int) (int, error) {
		switch op {
		case "read":
			reads++
		case "write":
			writes++
		default:
			others++
		}
		return n, nil
	}
	one := make([]byte, 65536)
	many := [][]byte{}
	for i := 0; i < 65536; i += 1024 {
		many = append(many, one[i:i+1024])
	}
	for _, c := range []struct {
		what          string
		reads, writes int
		f             func() error
	}{
		{"read of one run", 1, 0, func() error { _, err := d.ReadAt(one[:4096], 0); return err }},
		{"read of base, overlay, base", 3, 0, func() error { _, err := d.ReadAt(one[:32768], 28672); return err }},
		{"write of allocated and new", 0, 1, func() error { _, err := d.WritevAt(many, 28672); return err }},
		{"aligned first write", 0, 1, func() error { _, err := d.WriteAt(one, 1<<19); return err }},
		{"unaligned first write", 2, 1, func() error { _, err := d.WriteAt(one[:5000], 1<<18+700); return err }},
		{"second write", 0, 1, func() error { _, err := d.WriteAt(one[:5000], 1<<18+700); return err }},
		{"flush", 0, 1, func() error { return d.Flush() }},
	} {
		reads, writes, others = 0, 0, 0
		if err := c.f(); err != nil {
			t.Fatal(err)
		}
		if reads != c.reads || writes != c.writes {
			t.Errorf("%s: %d reads and %d writes, want %d and %d", c.what, reads, writes, c.reads, c.writes)
		}
	}
}
