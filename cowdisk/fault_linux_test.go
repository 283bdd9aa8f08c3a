package cowdisk

import (
	"bytes"
	"errors"
	"path/filepath"
	"runtime/debug"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A caller's memory may be a guest's, and vanish while it is read into or written from: that is a fault the caller can
// recover from, or the kernel's EFAULT, and the disk goes on and can be closed.
func TestVanishedBuffers(t *testing.T) {
	img := filepath.Join(t.TempDir(), "a.cow")
	mustCreate(t, img, CreateOptions{Size: 1 << 20})
	d := mustOpen(t, img, Options{})
	if _, err := d.WriteAt(bytes.Repeat([]byte{1}, 4096), 0); err != nil {
		t.Fatal(err)
	}
	f := memfd(t)
	mem := mapShared(t, f, 8192)
	if err := f.Truncate(0); err != nil {
		t.Fatal(err)
	}
	const there, hole = 0, 64 << 10
	for name, touch := range map[string]func() (int, error){
		"read":                 func() (int, error) { return d.ReadAt(mem[:4096], there) },
		"read of a hole":       func() (int, error) { return d.ReadAt(mem[:4096], hole) },
		"two reads":            func() (int, error) { return d.ReadvAt([][]byte{mem[:4096], mem[4096:]}, there) },
		"two reads of a hole":  func() (int, error) { return d.ReadvAt([][]byte{mem[:4096], mem[4096:]}, hole) },
		"first write":          func() (int, error) { return d.WriteAt(mem[:512], hole) },
		"first write of two":   func() (int, error) { return d.WritevAt([][]byte{mem[:512], mem[4096:4608]}, hole) },
		"second write":         func() (int, error) { return d.WriteAt(mem[:512], there) },
		"second write of two":  func() (int, error) { return d.WritevAt([][]byte{mem[:512], mem[4096:4608]}, there) },
		"write of many sizes":  func() (int, error) { return d.WritevAt([][]byte{mem[:3], mem[4096:4605]}, hole+1) },
		"read beyond the data": func() (int, error) { return d.ReadAt(mem, 1<<20-100) },
	} {
		fault, err := catch(func() error { _, err := touch(); return err })
		if !fault && !errors.Is(err, unix.EFAULT) {
			t.Errorf("%s: no fault, error %v", name, err)
		}
	}
	got := make([]byte, 4096)
	if _, err := d.ReadAt(got, hole); err != nil {
		t.Error(err)
	}
	wantSame(t, "the hole", got, make([]byte, 4096))
	closed := make(chan error, 1)
	go func() { closed <- d.Close() }()
	select {
	case err := <-closed: // failed writes are reported by the flush
		if err != nil && !errors.Is(err, unix.EFAULT) {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it cannot be closed")
	}
}

// catch reports whether f ended with a memory fault.
func catch(f func() error) (fault bool, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			_ = r.(interface{ Addr() uintptr }) // any other panic is one
			fault = true
		}
	}()
	return false, f()
}
