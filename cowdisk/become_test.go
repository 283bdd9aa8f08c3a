package cowdisk

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
)

// A frozen image has several overlays at once, in one process; nobody can write to it. A disk goes back to it, and forward again.
func TestBecome(t *testing.T) {
	dir := t.TempDir()
	_, want := baseFile(t, dir, 1<<20)
	path := func(name string) string { return filepath.Join(dir, name) }
	mustCreate(t, path("a"), CreateOptions{Backing: "base.img"})
	d := mustOpen(t, path("a"), Options{})
	defer d.Close()
	write := func(d *Disk, p []byte, off int64) {
		t.Helper()
		if _, err := d.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	copy(want[5000:], "frozen")
	write(d, []byte("frozen"), 5000)
	if err := d.Snapshot(path("live")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path("a"), Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("the frozen image can be opened for writing: %v", err)
	}
	overlay := func(name string) *Disk {
		t.Helper()
		mustCreate(t, path(name), CreateOptions{Backing: "a", BackingFormat: FormatCOW})
		return mustOpen(t, path(name), Options{})
	}
	write(d, []byte("parent"), 5000)
	for i := range 5 {
		child := overlay(fmt.Sprint("child", i))
		defer child.Close()
		wantSame(t, "child", contents(t, child), want)
		write(child, bytes.Repeat([]byte{byte(i)}, 9000), 4096)
	}
	for i := range 20 { // back, with others that read meanwhile
		var busy sync.WaitGroup
		stop := make(chan struct{})
		for range 2 {
			busy.Go(func() {
				for {
					if _, err := d.ReadAt(make([]byte, 3000), 10_000); err != nil {
						t.Error(err)
					}
					select {
					case <-stop:
						return
					default:
					}
				}
			})
		}
		n := overlay(fmt.Sprint("again", i))
		err := d.Become(n)
		close(stop)
		busy.Wait()
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, "went back", contents(t, d), want)
		if _, err := n.WriteAt([]byte("x"), 0); !errors.Is(err, ErrClosed) {
			t.Errorf("the disk that was given away can be written: %v", err)
		}
		write(d, []byte("written since"), 5000)
	}
	forward := mustOpen(t, path("live"), Options{}) // it was closed, as it was
	if err := d.Become(forward); err != nil {
		t.Fatal(err)
	}
	var p [6]byte
	if _, err := d.ReadAt(p[:], 5000); err != nil || (string(p[:]) != "parent" && string(p[:]) != "frozen") {
		t.Errorf("%q, %v", p, err) // it was never flushed
	}
	mustCreate(t, path("small"), CreateOptions{Size: 512})
	small := mustOpen(t, path("small"), Options{})
	defer small.Close()
	if err := d.Become(small); !errors.Is(err, ErrSize) {
		t.Errorf("another size: %v", err)
	}
	if err := d.Flush(); err != nil {
		t.Error(err)
	}
}
