package vhostuser_test

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/vhostuser"
	"github.com/moovm/moovm/virtioblk"
)

// serverProcess is this test program as a server of its own, on a raw or a cow
// image; the caller starts and kills it.
func serverProcess(t testing.TB, kind, img, sock string, queues int) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run=^TestServerProcess$")
	cmd.Env = append(os.Environ(), "MOOVM_TEST_SERVE="+kind, "MOOVM_TEST_IMAGE="+img,
		"MOOVM_TEST_SOCKET="+sock, "MOOVM_TEST_QUEUES="+strconv.Itoa(queues))
	cmd.Stderr = os.Stderr
	return cmd
}

// TestServerProcess is what serverProcess runs.
func TestServerProcess(t *testing.T) {
	kind := os.Getenv("MOOVM_TEST_SERVE")
	if kind == "" {
		t.Skip("only runs as a child of other tests")
	}
	var backend virtioblk.Backend
	img := os.Getenv("MOOVM_TEST_IMAGE")
	if kind == "raw" {
		f, err := virtioblk.OpenFile(img, false)
		if err != nil {
			t.Fatal(err)
		}
		backend = f
	} else {
		d, err := cowdisk.Open(img, cowdisk.Options{})
		if err != nil {
			t.Fatal(err)
		}
		backend = d
	}
	queues, _ := strconv.Atoi(os.Getenv("MOOVM_TEST_QUEUES"))
	dev, err := virtioblk.New(virtioblk.Config{Backend: backend, Queues: queues})
	if err != nil {
		t.Fatal(err)
	}
	l, err := vhostuser.Listen(os.Getenv("MOOVM_TEST_SOCKET"))
	if err != nil {
		t.Fatal(err)
	}
	vhostuser.Serve(context.Background(), l, dev, vhostuser.Options{Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))}) // until it is killed
}

// lockedBuffer is a buffer that can be read while a process writes to it.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// daemon is a server process that a test kills and starts again.
type daemon struct {
	t         *testing.T
	kind, img string
	sock      string
	queues    int
	cmd       *exec.Cmd
	kills     int
}

// startDaemon serves an image at a socket beside it, until the end of the test.
func startDaemon(t *testing.T, kind, img string, queues int) *daemon {
	t.Helper()
	d := &daemon{t: t, kind: kind, img: img, sock: filepath.Join(filepath.Dir(img), "sock"), queues: queues}
	d.start()
	t.Cleanup(func() {
		d.cmd.Process.Kill()
		d.cmd.Wait()
	})
	dial(t, d.sock).Close() // it is up
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	d.cmd = serverProcess(d.t, d.kind, d.img, d.sock, d.queues)
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
}

// kill ends the server by SIGKILL and starts another one.
func (d *daemon) kill() {
	d.t.Helper()
	d.cmd.Process.Kill()
	d.cmd.Wait()
	d.start()
	d.kills++
}

// dial connects to a server that may not be there yet.
func dial(t testing.TB, sock string) *net.UnixConn {
	t.Helper()
	for n := 0; ; n++ {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: sock, Net: "unix"})
		if err == nil {
			return c
		}
		if n > 4000 {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// serveHere serves a device at a socket from this process, until the end of the
// test.
func serveHere(t *testing.T, sock string, dev virtio.Device) {
	t.Helper()
	l, err := vhostuser.Listen(sock)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- vhostuser.Serve(ctx, l, dev, vhostuser.Options{}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

// overlayOn makes an overlay of base in dir and opens it.
func overlayOn(t *testing.T, dir, base string) *cowdisk.Disk {
	t.Helper()
	img := filepath.Join(dir, "overlay.cow")
	if err := cowdisk.Create(img, cowdisk.CreateOptions{Backing: base}); err != nil {
		t.Fatal(err)
	}
	d, err := cowdisk.Open(img, cowdisk.Options{BackingRoots: []string{filepath.Dir(base)}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}
