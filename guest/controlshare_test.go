package guest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/internal/pipe"
)

// A client on the share is a control line.
func TestControlShare(t *testing.T) {
	share := newControlShare()
	ours, theirs := net.Pipe()
	var wg sync.WaitGroup
	wg.Go(func() { _ = p9.NewServer(share).Handle(theirs, theirs) })
	client, err := p9.NewClient(ours)
	if err != nil {
		t.Fatal(err)
	}
	root, err := client.Attach("/")
	if err != nil {
		t.Fatal(err)
	}
	_, dir, err := root.Walk(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := dir.Open(p9.ReadOnly); err != nil {
		t.Fatal(err)
	}
	entries, err := dir.Readdir(0, 1000)
	if err != nil || len(entries) != 2 {
		t.Errorf("%v, %v", entries, err)
	}
	open := func(name string, mode p9.OpenFlags) p9.File {
		t.Helper()
		_, f, err := root.Walk([]string{name})
		if err == nil {
			_, _, err = f.Open(mode)
		}
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	out, in := open(control.ToHost, p9.WriteOnly), open(control.FromHost, p9.ReadOnly)

	var stdout bytes.Buffer
	serial := pipe.New()
	c := control.NewHost(serial, io.Discard, control.HostConfig{Stdout: &stdout})
	c.AddLine(share.toHost, share.fromHost)
	var run sync.WaitGroup
	run.Go(func() {
		if err := c.Run(); err != nil {
			t.Error(err)
		}
	})
	_, _ = serial.Write(control.AppendFrame(nil, control.FrameHello, nil))
	// The offsets of the writes mean nothing.
	for i, b := range [][]byte{control.AppendFrame(nil, control.FrameHello, nil), control.AppendFrame(nil, control.FrameStdout, []byte("text")), control.AppendFrame(nil, control.FrameExit, []byte{5, 0, 0, 0, 0, 0, 0, 0})} {
		if n, err := out.WriteAt(b, int64(i*100)); n != len(b) || err != nil {
			t.Errorf("%d, %v", n, err)
		}
	}
	buf := make([]byte, 100)
	if n, err := in.ReadAt(buf, 0); n != 0 || err != nil && !errors.Is(err, io.EOF) {
		t.Errorf("a read of nothing: %d, %v", n, err)
	}
	// The hello on the share decides where the host answers, though that on the
	// serial port may have arrived later; but it must have been read.
	for !c.State().Exited {
		_, _ = in.ReadAt(buf[:0], 0)
	}
	if err := c.Signal(2); err != nil {
		t.Error(err)
	}
	n, err := in.ReadAt(buf, 12345)
	if want := control.AppendFrame(nil, control.FrameSignal, []byte{2}); err != nil || !bytes.Equal(buf[:n], want) {
		t.Errorf("got %x, %v", buf[:n], err)
	}
	serial.Close()
	share.toHost.Close()
	share.fromHost.Close()
	run.Wait()
	if stdout.String() != "text" || c.State().Status != 5 {
		t.Errorf("stdout %q, %+v", stdout.String(), c.State())
	}
	if _, err := out.WriteAt([]byte("x"), 0); !errors.Is(err, linux.EPIPE) {
		t.Errorf("after the end: %v", err)
	}
	for _, name := range []string{control.ToHost, control.FromHost} {
		_, f, err := root.Walk([]string{name})
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := f.Open(p9.ReadWrite); !errors.Is(err, linux.EACCES) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := root.Walk([]string{"nonesuch"}); !errors.Is(err, linux.ENOENT) {
		t.Error(err)
	}
	client.Close()
	ours.Close()
	wg.Wait()
}
