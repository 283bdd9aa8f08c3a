package main

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/virtio/virtiotest"
)

// The program is killed while it serves an overlay on which nothing was
// flushed, and started again: the front-end goes on and every write is there.
func TestServeVhostUserKilled(t *testing.T) {
	dir := t.TempDir()
	want := bytes.Repeat([]byte("base"), 1<<18)
	if err := os.WriteFile(filepath.Join(dir, "base"), want, 0o600); err != nil {
		t.Fatal(err)
	}
	img, sock := filepath.Join(dir, "overlay.cow"), filepath.Join(dir, "s")
	if err := cowdisk.Create(img, cowdisk.CreateOptions{Backing: "base"}); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var errs bytes.Buffer
	start := func() (*exec.Cmd, *net.UnixConn) {
		t.Helper()
		cmd := &exec.Cmd{Path: self, Args: []string{"moovm", "-q", "serve", "vhost-user", "--socket", sock, img}, Stderr: &errs}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
			c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: sock, Net: "unix"})
			if err == nil {
				return cmd, c
			}
			if time.Now().After(end) {
				cmd.Process.Kill()
				cmd.Wait()
				t.Fatalf("%v\n%s", err, errs.String())
			}
		}
	}
	cmd, c := start()
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	if st, err := os.Stat(sock); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", st.Mode(), err)
	}
	mem, err := virtiotest.NewSharedMemory(4 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	v := virtiotest.NewVhostUser(t, c, mem)
	defer v.Close()
	b := virtiotest.NewBlock(virtiotest.Start(t, v, virtiotest.NewGuestOn(mem.Bytes), virtiotest.BlockFeatures, 16))
	for round := range 3 {
		for i := range 20 {
			off := (i*7 + round*131) % 256 * 4096
			p := bytes.Repeat([]byte{byte(round), byte(i)}, 2048)
			copy(want[off:], p)
			if st, _ := b.Request(0, virtiotest.BlkOut, uint64(off/512), p, nil); st != 0 {
				t.Fatalf("write: status %d", st)
			}
		}
		cmd.Process.Kill()
		cmd.Wait()
		cmd, c = start()
		v.Reconnect(c)
		got := make([]byte, len(want))
		if st, _ := b.Request(0, virtiotest.BlkIn, 0, nil, got); st != 0 || !bytes.Equal(got, want) {
			t.Fatalf("after kill %d: status %d, the disk is another\n%s", round+1, st, errs.String())
		}
	}
	// An ending that was asked for keeps everything, flushed or not.
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	d, err := cowdisk.Open(img, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := make([]byte, len(want))
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the image is another (%v)", err)
	}
}
