package vhostuser_test

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"

	"github.com/moovm/moovm/cowdisk"
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
