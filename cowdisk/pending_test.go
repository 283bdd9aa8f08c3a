package cowdisk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
)

// successor is what the next process finds after this one was killed: the same files, with the same part of them not yet on disk.
func (m *memFS) successor() *memFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := newMemFS()
	c.next, c.noPunch = m.next, m.noPunch
	for name, n := range m.nodes {
		c.nodes[name] = &memNode{dur: n.dur.clone(), cur: n.cur.clone(), log: append([]memOp(nil), n.log...), mtime: n.mtime, id: n.id}
	}
	return c
}

func sharedMem(t testing.TB, d *Disk) []byte {
	t.Helper()
	mem := make([]byte, d.PendingLen())
	if err := d.SharePending(mem); err != nil {
		t.Fatal(err)
	}
	return mem
}

// abandon leaves a disk as a killed process does: nothing is flushed, the files are unlocked, the memory is not touched any more.
func abandon(d *Disk) {
	d.chain.layers[0].bm.sharePending(nil)
	closeLayers(d.chain.layers)
}

// pendingSectors are the bits set in mem.
func pendingSectors(d *Disk, mem []byte) (s []int64) {
	p := newPendingBits(mem, d.size)
	p.pages(func(index int64) error {
		for i := range pageWords {
			for b := range int64(64) {
				if p.word(index, i)>>b&1 != 0 {
					s = append(s, index*pageSectors+int64(i)*64+b)
				}
			}
		}
		return nil
	})
	return s
}

// A server is killed at any change of the file, several times in a row: its successor, which gets the same memory, shows every write that
// was completed. In between the power fails: then the memory is gone, each sector is old or new, and what was flushed is there, whichever
// of the servers wrote it.
func TestPendingCrash(t *testing.T) {
	parallelSeeds(t, crashPoints()/8, func(seed uint64) (int, error) {
		c := newCrashRun(seed)
		c.every = 3
		var mem []byte
		for life := range 5 {
			d, err := Open("/d/img", Options{FS: c.fs, BitmapMemory: 1})
			if err != nil {
				return c.points, fmt.Errorf("life %d: %w", life, err)
			}
			if mem == nil {
				mem = make([]byte, d.PendingLen())
			}
			if err := d.SharePending(mem); err != nil {
				return c.points, fmt.Errorf("life %d: %w", life, err)
			}
			// What an interrupted request left is now what the disk contains; all else is as it was.
			got := make([]byte, crashDisk)
			if _, err := d.ReadAt(got, 0); err != nil {
				return c.points, err
			}
			if err := c.m.verifyNow(got); err != nil {
				return c.points, fmt.Errorf("life %d: %w", life, err)
			}
			c.m.now = got
			c.m.before = nil

			changes, die := 0, 1+c.r.IntN(60)
			var next struct {
				fs  *memFS
				mem []byte
				m   *model
			}
			kill := func() {
				next.fs, next.mem, next.m = c.fs.successor(), bytes.Clone(mem), c.m.clone()
			}
			c.fs.after = func() {
				c.crash()
				if changes++; changes == die && next.fs == nil {
					kill()
				}
			}
			for range 40 {
				before := bytes.Clone(c.m.now)
				c.m.before = before
				if err := c.step(d); err != nil {
					return c.points, err
				}
				c.m.before = nil
				if c.err != nil {
					return c.points, fmt.Errorf("life %d: %w", life, c.err)
				}
				if next.fs == nil && c.r.IntN(40) == 0 {
					kill() // between two requests
				}
				if next.fs != nil {
					break
				}
			}
			if next.fs == nil {
				kill()
			}
			c.fs.after = nil
			c.fs, mem, c.m = next.fs, next.mem, next.m
		}
		return c.points, nil
	})
}

func (m *model) clone() *model {
	c := &model{now: bytes.Clone(m.now), before: bytes.Clone(m.before), allowed: make([][]uint64, len(m.allowed))}
	for i, a := range m.allowed {
		c.allowed[i] = append([]uint64(nil), a...)
	}
	return c
}

// verifyNow wants every completed request to be there; of the one that was under way each sector is old or new.
func (m *model) verifyNow(got []byte) error {
	for s := 0; s < len(got); s += 512 {
		if !bytes.Equal(got[s:s+512], m.now[s:s+512]) && (m.before == nil || !bytes.Equal(got[s:s+512], m.before[s:s+512])) {
			return fmt.Errorf("sector %d is not what the killed server wrote", s/512)
		}
	}
	return nil
}

// Bits are in the memory as long as they are not durable, and no longer.
func TestPendingBits(t *testing.T) {
	m := newMemFS()
	m.put("/d/base", randomBytes(1<<20, 1), 50)
	for _, v := range []Variant{QEMUV2, UMLV3} {
		img := "/d/" + v.String()
		if err := Create(img, CreateOptions{Backing: "base", Size: 64 << 20, Variant: v, FS: m}); err != nil {
			t.Fatal(err)
		}
		d := mustOpen(t, img, Options{FS: m})
		d.WriteAt([]byte{1}, 0) // before there is a memory: flushed when there is
		mem := sharedMem(t, d)
		want := func(when string, want ...int64) {
			t.Helper()
			if got := pendingSectors(d, mem); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("%v, %s: %v is pending, want %v", v, when, got, want)
			}
		}
		want("fresh")
		d.WriteAt([]byte{1}, 40<<20+100)
		d.WriteAt([]byte{1}, 0)
		want("written", 81920, 81921, 81922, 81923, 81924, 81925, 81926, 81927)
		var during []int64
		m.fault = func(op string, n int) (int, error) {
			if op == "write" { // the bitmap, while another sector is written
				during = pendingSectors(d, mem)
				m.fault = nil
				d.WriteAt(make([]byte, 4096), 41<<20)
			}
			return n, nil
		}
		if err := d.Flush(); err != nil {
			t.Fatal(err)
		}
		if len(during) != 8 {
			t.Errorf("pending while the bitmap is written: %v", during)
		}
		want("flushed, but for what was written meanwhile", 83968, 83969, 83970, 83971, 83972, 83973, 83974, 83975)
		if err := d.SharePending(nil); err != nil {
			t.Fatal(err)
		}
		want("no longer shared")
		d.WriteAt(make([]byte, 4096), 42<<20)
		want("written elsewhere")
		d.Close()
	}
}

// Bits that the file got before the server was killed are not written again, those that it did not get are.
func TestPendingAdopt(t *testing.T) {
	m := newMemFS()
	if err := Create("/d/img", CreateOptions{Size: 64 << 20, FS: m}); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, "/d/img", Options{FS: m})
	mem := sharedMem(t, d)
	d.WriteAt(bytes.Repeat([]byte{7}, 8192), 1<<20)
	d.WriteAt(bytes.Repeat([]byte{8}, 4096), 50<<20)
	next := m.successor()
	f := next.nodes["/d/img"]
	f.cur.write([]byte{0xff}, 1056+256) // half of the first write's bits
	d = mustOpen(t, "/d/img", Options{FS: next})
	b := make([]byte, 3)
	if d.ReadAt(b[:1], 50<<20); b[0] != 0 {
		t.Fatal("the bit was in the file")
	}
	if err := d.SharePending(mem); err != nil {
		t.Fatal(err)
	}
	d.ReadAt(b[:1], 1<<20)
	d.ReadAt(b[1:2], 1<<20+8191)
	d.ReadAt(b[2:], 50<<20)
	if !bytes.Equal(b, []byte{7, 7, 8}) {
		t.Fatalf("read %v", b)
	}
	if got := pendingSectors(d, mem); len(got) != 16 || got[0] != 2056 {
		t.Fatalf("pending: %v", got)
	}
	before := d.Stats().Syncs
	if err := d.Flush(); err != nil || d.Stats().Syncs != before+2 {
		t.Fatalf("%d syncs, %v", d.Stats().Syncs-before, err)
	}
	if got := pendingSectors(d, mem); got != nil {
		t.Fatalf("pending after the flush: %v", got)
	}
	// A third one finds nothing to do, but what was overwritten may wait for a sync.
	next = next.successor()
	d = mustOpen(t, "/d/img", Options{FS: next})
	if err := d.SharePending(mem); err != nil {
		t.Fatal(err)
	}
	before = d.Stats().Syncs
	if err := d.Flush(); err != nil || d.Stats().Syncs != before+1 {
		t.Fatalf("%d syncs, %v", d.Stats().Syncs-before, err)
	}
}

// A server whose sync failed and that is then killed hands on the failure: what it wrote may be lost, and nobody may be told otherwise.
func TestPendingFailure(t *testing.T) {
	m := newMemFS()
	if err := Create("/d/img", CreateOptions{Size: 64 << 20, FS: m}); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, "/d/img", Options{FS: m})
	mem := sharedMem(t, d)
	d.WriteAt([]byte{9}, 1<<20)
	m.fault = func(op string, n int) (int, error) {
		if op == "sync" {
			return n, errMem
		}
		return n, nil
	}
	if err := d.Flush(); !errors.Is(err, ErrFailed) {
		t.Fatal(err)
	}
	d = mustOpen(t, "/d/img", Options{FS: m.successor()})
	if err := d.SharePending(mem); err != nil {
		t.Fatal(err)
	}
	b := []byte{0}
	if d.ReadAt(b, 1<<20); b[0] != 9 {
		t.Error("the write is lost")
	}
	if err := d.Flush(); !errors.Is(err, ErrFailed) {
		t.Fatalf("the successor's flush: %v", err)
	}
}

// A snapshot takes the memory along to the new overlay.
func TestPendingSnapshot(t *testing.T) {
	m := newMemFS()
	m.put("/d/base", randomBytes(1<<20, 1), 50)
	if err := Create("/d/img", CreateOptions{Backing: "base", FS: m}); err != nil {
		t.Fatal(err)
	}
	d := mustOpen(t, "/d/img", Options{FS: m})
	mem := sharedMem(t, d)
	d.WriteAt([]byte{1, 2, 3}, 5000)
	if err := d.Snapshot("/d/new"); err != nil {
		t.Fatal(err)
	}
	d.WriteAt([]byte{4}, 5002)
	next := m.successor()
	if err := mustOpen(t, "/d/img", Options{FS: next}).SharePending(mem); !errors.Is(err, ErrPending) {
		t.Fatalf("the frozen image: %v", err)
	}
	d = mustOpen(t, "/d/new", Options{FS: m.successor()})
	if err := d.SharePending(mem); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 3)
	if d.ReadAt(b, 5000); !bytes.Equal(b, []byte{1, 2, 4}) {
		t.Fatal(b)
	}
}

func TestPendingRefused(t *testing.T) {
	m := newMemFS()
	for _, img := range []string{"/d/a", "/d/b"} {
		if err := Create(img, CreateOptions{Size: 64<<20 + 512, FS: m}); err != nil {
			t.Fatal(err)
		}
	}
	a := mustOpen(t, "/d/a", Options{FS: m})
	mem := sharedMem(t, a)
	if err := a.SharePending(mem[:len(mem)-1]); !errors.Is(err, ErrPending) {
		t.Errorf("too short: %v", err)
	}
	b := mustOpen(t, "/d/b", Options{FS: m})
	if err := b.SharePending(mem); !errors.Is(err, ErrPending) {
		t.Errorf("of another image: %v", err)
	}
	a.Close()
	b.Close()
	for what, change := range map[string]func(p *pendingBits){
		"not ours":              func(p *pendingBits) { p.mem[0] = 'x' },
		"beyond the disk":       func(p *pendingBits) { p.add(4, 0, 2) },
		"beyond the file":       func(p *pendingBits) { p.add(4, 0, 1) },
		"beyond the bitmap":     func(p *pendingBits) { p.summary[0] |= 1 << 5 },
		"beyond the last pages": func(p *pendingBits) { p.summary[len(p.summary)-1] |= 0x80 },
	} {
		a = mustOpen(t, "/d/a", Options{FS: m})
		mem := bytes.Clone(mem)
		change(newPendingBits(mem, a.size))
		if err := a.SharePending(mem); !errors.Is(err, ErrPending) {
			t.Errorf("%s: %v", what, err)
		}
		if n := a.Allocated(); n != 0 {
			t.Errorf("%s: %d sectors adopted", what, n)
		}
		if _, err := a.WriteAt([]byte{1}, 0); err != nil {
			t.Errorf("%s: then: %v", what, err)
		}
		a.Close()
		clearImage(t, m, "/d/a")
	}
	ro := mustOpen(t, "/d/b", Options{FS: m, ReadOnly: true})
	if n := ro.PendingLen(); n != 0 || ro.SharePending(nil) != nil {
		t.Errorf("read-only: %d", n)
	}
}

// clearImage takes the sectors of an image away again.
func clearImage(t *testing.T, m *memFS, img string) {
	t.Helper()
	n := m.nodes[img]
	n.cur.zero(1056, n.cur.size-1056)
	n.cur.truncate(1056 + (64<<20+512)/4096 + 1)
	n.dur = n.cur.clone()
}

// Writers, flushes and a snapshot of file and memory at one moment: everything that was completed before that moment is there.
func TestPendingConcurrent(t *testing.T) {
	m := newMemFS()
	const size = 4 << 20
	m.put("/d/base", make([]byte, size), 50)
	for round := range 6 {
		img := fmt.Sprintf("/d/img%d", round)
		if err := Create(img, CreateOptions{Backing: "base", FS: m}); err != nil {
			t.Fatal(err)
		}
		d := mustOpen(t, img, Options{FS: m})
		mem := sharedMem(t, d)
		const writers = 8
		var done [size / 512]atomic.Uint32 // the last completed value of each sector
		var wg sync.WaitGroup
		var stop atomic.Bool
		for w := range writers {
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), uint64(round)))
				p := make([]byte, 512)
				for i := uint32(1); !stop.Load() && i < 5000; i++ {
					s := r.IntN(size/512/writers)*writers + w // neighbours belong to other writers
					binary.LittleEndian.PutUint32(p, i)
					if _, err := d.WriteAt(p, int64(s)*512); err != nil {
						t.Error(err)
					}
					done[s].Store(i)
					if i%64 == 0 && w == 0 {
						if err := d.Flush(); err != nil {
							t.Error(err)
						}
					}
				}
			})
		}
		for done[0].Load() == 0 && d.Allocated() < int64(1000*(round+1)) {
			d.Flush()
		}
		// The moment of death: completed writes first, then memory, then files; whatever happens in between only adds to what is there.
		var want [size / 512]uint32
		for s := range want {
			want[s] = done[s].Load()
		}
		bm := d.chain.layers[0].bm
		bm.mu.Lock()
		left := bytes.Clone(mem)
		bm.mu.Unlock()
		next := m.successor()
		stop.Store(true)
		wg.Wait()
		d.Close()
		d = mustOpen(t, img, Options{FS: next})
		if err := d.SharePending(left); err != nil {
			t.Fatal(err)
		}
		p, n := make([]byte, 4), 0
		for s, w := range want {
			if d.ReadAt(p, int64(s)*512); binary.LittleEndian.Uint32(p) < w {
				t.Fatalf("round %d, sector %d: write %d was completed, %d is there", round, s, w, binary.LittleEndian.Uint32(p))
			}
			if w > 0 {
				n++
			}
		}
		if n == 0 {
			t.Fatal("nothing was written")
		}
		d.Close()
	}
}

// What lies in the memory costs an error, or this image's contents, and nothing else.
func FuzzPending(f *testing.F) {
	f.Add([]byte{}, uint16(0))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 0}, uint16(0))
	f.Add(bytes.Repeat([]byte{0xff}, 300), uint16(64))
	f.Add([]byte{2}, uint16(4096+5000))
	f.Add([]byte("MOOVPND2"), uint16(0))
	f.Fuzz(func(t *testing.T, b []byte, at uint16) {
		m := newMemFS()
		const size = 48<<20 + 512
		base := randomBytes(9000, 2)
		m.put("/d/base", base, 50)
		if err := Create("/d/img", CreateOptions{Backing: "base", Size: size, FS: m}); err != nil {
			t.Fatal(err)
		}
		d := mustOpen(t, "/d/img", Options{FS: m})
		mem := sharedMem(t, d)
		d.WriteAt(bytes.Repeat([]byte{1}, 4096), 20<<20)
		guard := maps.Clone(m.nodes)
		m = m.successor()
		if copy(mem[min(int(at), len(mem)):], b); at%2 == 0 {
			newPendingBits(mem, size).stamp(&layer{id: FileID{1, guard["/d/img"].id}, size: size})
		}
		d, err := Open("/d/img", Options{FS: m})
		if err != nil {
			t.Fatal(err)
		}
		err = d.SharePending(mem)
		if err != nil && (!errors.Is(err, ErrPending) || d.Allocated() != 0) {
			t.Fatalf("%d sectors, %v", d.Allocated(), err)
		}
		p, q := bytes.Repeat([]byte{9}, 5000), make([]byte, 5000)
		for _, off := range []int64{0, 20<<20 + 3, size - 5000} {
			if _, err := d.WriteAt(p, off); err != nil {
				t.Fatal(err)
			}
			if _, err := d.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
				t.Fatal("what was written is not there", err)
			}
		}
		d.Close()
		if r, err := Check(t.Context(), "/d/img", false, ToolOptions{Options: Options{FS: m}}); err != nil || !r.Clean() {
			t.Fatalf("%+v %v", r, err)
		}
		if !bytes.Equal(m.contents("/d/base"), base) {
			t.Fatal("the base changed")
		}
	})
}
