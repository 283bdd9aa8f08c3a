package cowdisk

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// mount needs root.
func mount(t *testing.T, source, fstype string, flags uintptr, data string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount(source, dir, fstype, flags, data); err != nil {
		t.Skipf("mounting needs root: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestReadOnlyFileSystem(t *testing.T) {
	dir := t.TempDir()
	_, want := baseFile(t, dir, 8192)
	mustCreate(t, filepath.Join(dir, "a"), CreateOptions{Backing: "base.img"})
	ro := mount(t, dir, "", unix.MS_BIND, "")
	if err := unix.Mount("", ro, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Skipf("cannot make it read-only: %v", err)
	}
	if _, err := Open(filepath.Join(ro, "a"), Options{}); !errors.Is(err, ErrReadOnly) || !errors.Is(err, unix.EROFS) {
		t.Errorf("open: %v", err)
	} else {
		t.Log(err)
	}
	if err := Create(filepath.Join(ro, "b"), CreateOptions{Size: 512}); !errors.Is(err, ErrReadOnly) {
		t.Errorf("create: %v", err)
	}
	d := mustOpen(t, filepath.Join(ro, "a"), Options{ReadOnly: true})
	wantSame(t, "read-only", contents(t, d), want)
	d.Close()
}

// A disk that is full is an error of that write; what was flushed before is safe, and with room again the image opens and goes on.
func TestFullFileSystem(t *testing.T) {
	dir := mount(t, "tmpfs", "tmpfs", 0, "size=1m")
	img, balast := filepath.Join(dir, "a"), filepath.Join(dir, "balast")
	writeFile(t, balast, make([]byte, 300<<10))
	mustCreate(t, img, CreateOptions{Size: 8 << 20})
	d := mustOpen(t, img, Options{})
	p := randomBytes(65536, 1)
	if _, err := d.WriteAt(p, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	var err error
	var good int64
	for off := int64(65536); err == nil && off < 8<<20; off += 65536 {
		if _, err = d.WriteAt(p, off); err == nil {
			good = off
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("%v", err)
	}
	t.Log(err)
	if err := d.Flush(); !errors.Is(err, ErrFailed) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Flush: %v", err)
	}
	got := make([]byte, 65536)
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
		t.Errorf("reading on: %v", err)
	}
	if err := d.Close(); !errors.Is(err, ErrFailed) {
		t.Errorf("Close: %v", err)
	}
	os.Remove(balast)
	if r, err := Check(t.Context(), img, false, ToolOptions{}); err != nil || !r.Clean() {
		t.Errorf("%+v %v", r, err)
	}
	d = mustOpen(t, img, Options{})
	for _, off := range []int64{0, good} {
		if _, err := d.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
			t.Errorf("offset %d after opening again: %v", off, err)
		}
	}
	if _, err := d.WriteAt(p, good+65536); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}
