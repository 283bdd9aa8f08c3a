package cowdisk

import (
	"bytes"
	"context"
	"errors"
	"testing"
)

// A host that hangs in the middle of a write does not keep CloseContext; what was flushed is there, and when the host goes on, so does the
// close.
func TestCloseContext(t *testing.T) {
	fs := newMemFS()
	o := Options{FS: fs}
	if err := Create("/img", CreateOptions{FS: fs, Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	d, err := Open("/img", o)
	if err != nil {
		t.Fatal(err)
	}
	flushed := bytes.Repeat([]byte("flushed!"), 512)
	if _, err := d.WriteAt(flushed, 0); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
	hanging, release := make(chan bool), make(chan bool)
	first := true
	fs.fault = func(op string, n int) (int, error) {
		if op == "write" && first {
			first = false
			close(hanging)
			<-release
		}
		return n, nil
	}
	wrote := make(chan error, 1)
	go func() {
		_, err := d.WriteAt(make([]byte, 4096), 8192)
		wrote <- err
	}()
	<-hanging
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 2 { // the second does not take the first for done
		if err := d.CloseContext(ctx); !errors.Is(err, ErrBusy) {
			t.Errorf("close while a write hangs: %v, want ErrBusy", err)
		}
	}
	if err := d.checkLocked(fs); !errors.Is(err, ErrLocked) {
		t.Errorf("opened while a write may still come: %v", err)
	}
	close(release)
	if err := <-wrote; err != nil {
		t.Error(err)
	}
	if err := d.CloseContext(t.Context()); err != nil {
		t.Error(err)
	}
	got, err := readAll("/img", o)
	if err != nil || !bytes.Equal(got[:len(flushed)], flushed) {
		t.Errorf("what was flushed is another (%v)", err)
	}
}

// checkLocked tries to open the disk's image once more.
func (d *Disk) checkLocked(fs *memFS) error {
	again, err := Open(d.path, Options{FS: fs})
	if err == nil {
		again.Close()
	}
	return err
}
