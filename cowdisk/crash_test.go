package cowdisk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// neverDone is the context of checks that nobody cancels.
var neverDone = context.Background()

var hashSeed = maphash.MakeSeed()

// model is what a disk may contain: the bytes as they are now, and for each sector every content it may have after a crash.
type model struct {
	now     []byte
	before  []byte     // the same without the request under way, for tests that interrupt one; nil = none is
	allowed [][]uint64 // hashes; the first is what was flushed
}

func newModel(b []byte) *model {
	m := &model{now: bytes.Clone(b), allowed: make([][]uint64, len(b)/512)}
	m.flushed()
	return m
}

func (m *model) sector(i int) uint64 { return maphash.Bytes(hashSeed, m.now[i*512:i*512+512]) }

// write changes the contents and allows them; what was there before stays allowed.
func (m *model) write(off int, p []byte) {
	copy(m.now[off:], p)
	for s := off / 512; s*512 < off+len(p); s++ {
		m.allowed[s] = append(m.allowed[s], m.sector(s))
	}
}

// flushed: only the present contents are allowed.
func (m *model) flushed() {
	for s := range m.allowed {
		m.allowed[s] = append(m.allowed[s][:0], m.sector(s))
	}
}

func (m *model) verify(got []byte) error {
	if len(got) != len(m.now) {
		return fmt.Errorf("%d bytes, want %d", len(got), len(m.now))
	}
	for s := range m.allowed {
		if !slices.Contains(m.allowed[s], maphash.Bytes(hashSeed, got[s*512:s*512+512])) {
			return fmt.Errorf("sector %d is neither old nor new (%d possible contents)", s, len(m.allowed[s]))
		}
	}
	return nil
}

// crashRun is a random workload on one image; at every change of a file the power fails on a copy of it.
type crashRun struct {
	fs     *memFS
	m      *model
	r      *rand.Rand
	points int
	every  int // crash at one in so many points
	err    error
}

const crashDisk = 24 * 4096

// newCrashRun makes an image of random layout, depth and base length.
func newCrashRun(seed uint64) *crashRun {
	c := &crashRun{fs: newMemFS(), r: rand.New(rand.NewPCG(seed, 99)), every: 1}
	c.fs.noPunch = c.r.IntN(8) == 0
	base := randomBytes([]int{crashDisk, crashDisk / 2, crashDisk + 8192, 5000}[c.r.IntN(4)], seed)
	c.fs.put("/d/base", base, 50)
	want := make([]byte, crashDisk)
	copy(want, base)
	backing := "/d/base"
	if c.r.IntN(2) == 0 { // a layer in between, with a bitmap of any mixture
		mid := randomBytes(crashDisk, seed+1)
		f := fixture{variant: QEMUV2, backing: "/d/base", size: crashDisk}
		c.fs.put("/d/mid", f.image(mid, func(s int) bool {
			if c.r.IntN(3) == 0 {
				copy(want[s*512:s*512+512], mid[s*512:])
				return true
			}
			return false
		}), 60)
		backing = "/d/mid\x00moovmCOW" // behind the NUL: that it is an image
	}
	f := allFixtures[c.r.IntN(10)] // the writable ones
	f.backing, f.size, f.mtime = backing, crashDisk, 0
	top := randomBytes(crashDisk, seed+2)
	mixed := c.r.IntN(3)
	c.fs.put("/d/img", f.image(top, func(s int) bool {
		if mixed == 0 && c.r.IntN(4) == 0 || mixed == 1 && s/8%3 == 0 {
			copy(want[s*512:s*512+512], top[s*512:])
			return true
		}
		return false
	}), 70)
	c.m = newModel(want)
	return c
}

// crash loses power on a copy and looks at what is left.
func (c *crashRun) crash() {
	if c.err != nil || c.r.IntN(c.every) != 0 {
		return
	}
	c.points++
	if err := c.inspect(c.fs.crash(c.r)); err != nil {
		c.err = fmt.Errorf("crash point %d: %w", c.points, err)
	}
}

func (c *crashRun) inspect(after *memFS) error {
	d, err := Open("/d/img", Options{FS: after, ReadOnly: true, BitmapMemory: 1})
	if err != nil {
		return err
	}
	defer d.Close()
	got := make([]byte, d.Size())
	if _, err := d.ReadAt(got, 0); err != nil {
		return err
	}
	if err := c.m.verify(got); err != nil {
		return err
	}
	if c.points%4 == 0 {
		d.Close()
		res, err := Check(neverDone, "/d/img", false, ToolOptions{Options: Options{FS: after}})
		if err != nil {
			return err
		}
		if !res.Clean() {
			return fmt.Errorf("check found %+v", res.Problems)
		}
	}
	return nil
}

// step does one random operation. The model knows about it before it begins, as a crash may come in the middle.
func (c *crashRun) step(d *Disk) error {
	r := c.r
	off := r.IntN(crashDisk)
	n := min(r.IntN([]int{600, 5000, 30000}[r.IntN(3)])+1, crashDisk-off)
	if r.IntN(2) == 0 {
		off &^= 511
		n = min((n+511)&^511, crashDisk-off)
	}
	switch r.IntN(8) {
	case 0:
		c.m.write(off, make([]byte, n))
		if c.fs.noPunch { // a discard would leave what it likes
			return d.WriteZeroes(int64(off), int64(n), true)
		}
		return d.Discard(int64(off), int64(n))
	case 1:
		c.m.write(off, make([]byte, n))
		return d.WriteZeroes(int64(off), int64(n), r.IntN(2) == 0)
	case 2:
		err := d.Flush()
		if err == nil {
			c.m.flushed()
		}
		return err
	case 3, 4:
		p := randomBytes(n, r.Uint64())
		c.m.write(off, p)
		a := r.IntN(n + 1)
		_, err := d.WritevAt([][]byte{p[:a], p[a:]}, int64(off))
		return err
	default:
		p := randomBytes(n, r.Uint64())
		c.m.write(off, p)
		_, err := d.WriteAt(p, int64(off))
		return err
	}
}

// crashPoints is how many crash points to try.
func crashPoints() int {
	switch {
	case soak() != 0:
		return 3_000_000
	case os.Getenv("MOOVM_TEST_LONG") != "":
		return 100_000
	case raceEnabled:
		return 2_000
	}
	return 6_000
}

// soak is how long each of the random tests goes on: 0 without MOOVM_SOAK, with it MOOVM_SOAK_TIME (such as 10m), or until millions of
// crash points were tried.
func soak() time.Duration {
	if os.Getenv("MOOVM_SOAK") == "" {
		return 0
	}
	if d, err := time.ParseDuration(os.Getenv("MOOVM_SOAK_TIME")); err == nil {
		return d
	}
	return noLimit
}

const noLimit = 1000 * time.Hour

// parallelSeeds runs f with new seeds on every processor until it has done enough, or the time of the soak is over.
func parallelSeeds(t *testing.T, enough int, f func(seed uint64) (points int, err error)) {
	var total, seeds atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	limit := soak()
	first := uint64(0)
	if limit != 0 { // other runs than last time; what fails tells its seed
		first = uint64(start.UnixNano())
		if limit < noLimit {
			enough = 1 << 62
		}
	}
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for total.Load() < int64(enough) && !t.Failed() && (limit == 0 || time.Since(start) < limit) {
				seed := first + uint64(seeds.Add(1))
				n, err := f(seed)
				total.Add(int64(n))
				if err != nil {
					t.Errorf("seed %d: %v", seed, err)
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	t.Logf("%d points in %d runs, %v, %.0f a minute", total.Load(), seeds.Load(), took.Round(time.Millisecond), float64(total.Load())/took.Minutes())
}

// Power fails at every change of a file, and any part of what was not synced is on disk: every sector is old or new, what was flushed is
// there, and check finds nothing.
func TestCrash(t *testing.T) {
	parallelSeeds(t, crashPoints(), func(seed uint64) (int, error) {
		c := newCrashRun(seed)
		d, err := Open("/d/img", Options{FS: c.fs})
		if err != nil {
			return 0, err
		}
		c.fs.after = c.crash
		for range 60 {
			if err := c.step(d); err != nil {
				return c.points, err
			}
			if c.err != nil {
				return c.points, c.err
			}
		}
		if err := d.Close(); err != nil {
			return c.points, err
		}
		c.m.flushed()
		c.crash()
		return c.points, c.err
	})
}

// The same with a call of the file system that fails or is cut short: no bit leaks, what was flushed stays, and every later flush tells.
func TestFaults(t *testing.T) {
	parallelSeeds(t, crashPoints()/2, func(seed uint64) (int, error) {
		c := newCrashRun(seed)
		c.every = 4
		d, err := Open("/d/img", Options{FS: c.fs})
		if err != nil {
			return 0, err
		}
		calls, hit := 0, c.r.IntN(250)
		kind := c.r.IntN(3) // fail once, fail from then on, cut writes short
		failed := false
		c.fs.fault = func(op string, n int) (int, error) {
			if op == "stat" {
				return n, nil
			}
			calls++
			if kind == 2 {
				if op == "write" && n > 1 {
					n = 1 + c.r.IntN(n)
				}
				return n, nil
			}
			if calls == hit || kind == 1 && calls > hit {
				if op == "write" || op == "sync" || op == "punch" || op == "truncate" {
					failed = true
				}
				if op == "write" && n > 0 {
					n = c.r.IntN(n) // a part of it
				} else {
					n = 0
				}
				return n, errMem
			}
			return n, nil
		}
		c.fs.after = c.crash
		told := false
		for i := range 60 {
			before := failed
			err := c.step(d)
			if err != nil {
				told = true
				if !errors.Is(err, errMem) {
					return c.points, fmt.Errorf("step %d: %w", i, err)
				}
				// What failed may or may not have happened; from here on it is what the disk shows now.
				fault := c.fs.fault
				c.fs.fault = nil
				got := make([]byte, crashDisk)
				if _, err := d.ReadAt(got, 0); err != nil {
					return c.points, err
				}
				if err := c.m.verify(got); err != nil {
					return c.points, fmt.Errorf("step %d failed: %w", i, err)
				}
				copy(c.m.now, got)
				c.fs.fault = fault
			} else if failed && !before {
				return c.points, fmt.Errorf("step %d: a call failed and nobody was told", i)
			}
			if failed && told {
				if err := d.Flush(); !errors.Is(err, ErrFailed) || !errors.Is(err, errMem) {
					return c.points, fmt.Errorf("step %d: Flush after a failure: %v", i, err)
				}
			}
			if c.err != nil {
				return c.points, c.err
			}
		}
		c.fs.fault = nil
		err = d.Close()
		if failed && err == nil {
			return c.points, errors.New("Close hides the failure")
		}
		c.crash()
		return c.points, c.err
	})
}
