package main

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/hangfs"
	"github.com/moovm/moovm/virtio/virtiotest"
)

// A server whose disk hangs in a read ends at a signal, with its own status,
// and says which disk it was.
func TestServeHangingDisk(t *testing.T) {
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGINT} {
		t.Run(unix.SignalName(sig), func(t *testing.T) {
			t.Parallel()
			file := hangfs.New(t, 1<<20)
			sock := filepath.Join(t.TempDir(), "s")
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			var errs bytes.Buffer
			cmd := &exec.Cmd{Path: self, Args: []string{"moovm", "serve", "vhost-user", "--socket", sock, file.Path + ",format=raw"}, Stderr: &errs}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			defer cmd.Process.Kill()
			var c *net.UnixConn
			for end := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Millisecond) {
				if c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: sock, Net: "unix"}); err == nil {
					break
				}
				if time.Now().After(end) {
					t.Fatal(err)
				}
			}
			mem, err := virtiotest.NewSharedMemory(4 << 20)
			if err != nil {
				t.Fatal(err)
			}
			defer mem.Close()
			v := virtiotest.NewVhostUser(t, c, mem)
			defer v.Close()
			b := virtiotest.NewBlock(virtiotest.Start(t, v, virtiotest.NewGuestOn(mem.Bytes), virtiotest.BlockFeatures, 16))
			if st, _ := b.Request(0, virtiotest.BlkIn, 0, nil, make([]byte, 4096)); st != 0 {
				t.Fatalf("read: status %d", st)
			}
			file.Hang()
			at, header := b.Guest.Alloc(8192, 4096)
			header[0] = virtiotest.BlkIn
			if _, err := b.Rings[0].Add(virtiotest.Buf{Addr: at, Len: 16}, virtiotest.Buf{Addr: at + 4096, Len: 4096, Write: true},
				virtiotest.Buf{Addr: at + 16, Len: 1, Write: true}); err != nil {
				t.Fatal(err)
			}
			b.Kick(0)
			file.Waited(t)
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-ended:
				if err != nil || !strings.Contains(errs.String(), "disk "+file.Path) {
					t.Errorf("%v, it says %q", err, errs.String())
				}
			case <-time.After(5 * time.Minute):
				t.Error("it does not end")
			}
		})
	}
}
