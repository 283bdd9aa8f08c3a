package fence

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

// serve runs Serve on a socket of its own.
func serve(t *testing.T, fs p9.Attacher) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "9p")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, Config{Attacher: fs}) }()
	stop = func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("Serve did not end")
		}
		done <- nil // for the next one who asks
	}
	t.Cleanup(stop)
	return path, stop
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestServe(t *testing.T) {
	fs := newFakeFS()
	path, stop := serve(t, fs)
	for range 3 {
		client, err := p9.NewClient(dial(t, path))
		if err != nil {
			t.Fatal(err)
		}
		root, err := client.Attach("")
		if err != nil {
			t.Fatal(err)
		}
		_, f, err := root.Walk([]string{"d", "file"})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := f.Open(p9.ReadOnly); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1<<20)
		if n, err := f.ReadAt(b, 0); err != nil || n != len(b) || b[1000] != 1000&0xff {
			t.Errorf("ReadAt: %d, %v", n, err)
		}
	}
	if fs.live.Load() == 0 {
		t.Error("nothing is open while the clients are there")
	}
	stop() // with the clients still connected
	if n := fs.live.Load(); n != 0 {
		t.Errorf("%d files were not closed", n)
	}
}

// A client that hangs up in the middle of a message, or sends rubbish, loses
// its connection and nothing else.
func TestServeRubbish(t *testing.T) {
	fs := newFakeFS()
	path, _ := serve(t, fs)
	for _, b := range [][]byte{nil, {1}, {0, 0, 0, 0, 0, 0, 0}, {255, 255, 255, 255, 100, 0, 0}, wire.Version(8192)[:12]} {
		conn := dial(t, path)
		conn.Write(b)
		conn.(*net.UnixConn).CloseWrite()
		if n, err := io.Copy(io.Discard, conn); n != 0 || err != nil {
			t.Errorf("%v: %d bytes back, %v", b, n, err)
		}
	}
	if _, err := p9.NewClient(dial(t, path)); err != nil {
		t.Error(err)
	}
}

// A client that asks and never reads what it is told does not keep Serve from ending.
func TestServeSilentClient(t *testing.T) {
	fs := newFakeFS()
	path, stop := serve(t, fs)
	conn := dial(t, path)
	go func() {
		conn.Write(wire.Version(DefaultMsize))
		conn.Write(wire.Attach(1, 0))
		conn.Write(wire.Walk(2, 0, 1, "f"))
		conn.Write(wire.Open(3, 1, 0))
		for tag := uint16(10); ; tag++ {
			if _, err := conn.Write(wire.Read(tag, 1, 0, DefaultMsize)); err != nil {
				return
			}
		}
	}()
	for fs.running.Load() == 0 && fs.opens.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	stop()
	if n := fs.live.Load(); n != 0 {
		t.Errorf("%d files were not closed", n)
	}
}
