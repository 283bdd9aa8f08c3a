package cowdisk

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
)

// sameSecond is a base that was written in the present second, which does not pass by itself, and two overlays of it with data.
func sameSecond(seed uint64, cow bool) (fs *memFS, contents map[string][]byte, err error) {
	fs = newMemFS()
	fs.clock = 100
	base := randomBytes(crashDisk, seed)
	backing, format := "base", FormatRaw
	fs.put("/d/base", base, fs.clock)
	if cow {
		if err := Create("/d/mid", CreateOptions{Backing: "base", Size: crashDisk, FS: fs}); err != nil {
			return nil, nil, err
		}
		fs = fs.killed() // all of it is on disk
		fs.clock = 100
		fs.nodes["/d/mid"].mtime = 100
		backing, format = "mid", FormatCOW
	}
	contents = map[string][]byte{}
	for i, p := range []string{"/d/img", "/d/sibling"} {
		if err := Create(p, CreateOptions{Backing: backing, BackingFormat: format, FS: fs}); err != nil {
			return nil, nil, err
		}
		d, err := Open(p, Options{FS: fs})
		if err != nil {
			return nil, nil, err
		}
		b := bytes.Clone(base)
		copy(b[8192*(i+1):], randomBytes(10000, seed+uint64(i)+1))
		if _, err := d.WriteAt(b[8192*(i+1):8192*(i+1)+10000], int64(8192*(i+1))); err != nil {
			return nil, nil, err
		}
		if err := d.Close(); err != nil {
			return nil, nil, err
		}
		contents[p] = b
	}
	return fs, contents, nil
}

// A commit within the second in which the base was last written, and power fails at every change: the overlay has its contents, and its
// sibling has its own or is refused as stale.
func TestCommitSameSecond(t *testing.T) {
	parallelSeeds(t, crashPoints()/10, func(seed uint64) (int, error) {
		fs, want, err := sameSecond(seed, seed%2 == 0)
		if err != nil {
			return 0, err
		}
		r := rand.New(rand.NewPCG(seed, 5))
		points, stale := 0, 0
		var failed error
		inspect := func(after *memFS) error {
			b, err := readAll("/d/img", Options{FS: after})
			if err != nil {
				return fmt.Errorf("the overlay: %w", err)
			}
			if !bytes.Equal(b, want["/d/img"]) {
				return errors.New("the contents of the overlay differ")
			}
			b, err = readAll("/d/sibling", Options{FS: after})
			if errors.Is(err, ErrStaleBacking) {
				stale++
				return nil
			}
			if err != nil {
				return fmt.Errorf("the sibling: %w", err)
			}
			if !bytes.Equal(b, want["/d/sibling"]) {
				return errors.New("the sibling's base changed and nobody notices")
			}
			return nil
		}
		fs.after = func() {
			if seed%4 > 1 && r.IntN(3) == 0 {
				fs.clock++
			}
			for range 3 {
				if failed == nil {
					points++
					failed = inspect(fs.crash(r))
				}
			}
		}
		if err := Commit(t.Context(), "/d/img", ToolOptions{Options: Options{FS: fs}}); err != nil {
			return points, err
		}
		fs.after()
		if failed == nil && stale == 0 {
			failed = errors.New("the sibling never was stale")
		}
		return points, failed
	})
}

// A snapshot records the time of the image that it stands on: that time is on disk first.
func TestSnapshotTimeIsOnDisk(t *testing.T) {
	for seed := range uint64(20) {
		fs, want, err := sameSecond(seed, false)
		if err != nil {
			t.Fatal(err)
		}
		d := mustOpen(t, "/d/img", Options{FS: fs})
		fs.clock += 5
		p := randomBytes(5000, seed+9)
		copy(want["/d/img"][20000:], p)
		if _, err := d.WriteAt(p, 20000); err != nil {
			t.Fatal(err)
		}
		if err := d.Snapshot("/d/snap"); err != nil {
			t.Fatal(err)
		}
		b, err := readAll("/d/snap", Options{FS: fs.crash(rand.New(rand.NewPCG(seed, 1)))})
		if err != nil || !bytes.Equal(b, want["/d/img"]) {
			t.Fatalf("seed %d: after a crash: %v", seed, err)
		}
		d.Close()
	}
}
