package sharefs_test

import (
	"os"
	"strings"
	"testing"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio9p/fence"
	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

// exchange is one message to a session and its reply.
type exchange struct {
	msg, reply []byte
	done       chan struct{}
}

func (x *exchange) Read(p []byte) (int, error) {
	n := copy(p, x.msg)
	x.msg = x.msg[n:]
	return n, nil
}

func (x *exchange) Write(p []byte) (int, error) { x.reply = append(x.reply, p...); return len(p), nil }
func (x *exchange) Done()                       { close(x.done) }

// session is a session of the share that messages are given to by hand; do
// returns the reply and its errno.
func session(t *testing.T, a p9.Attacher) (*fence.Session, func(msg []byte) (wire.Reply, unix.Errno)) {
	t.Helper()
	s := fence.NewSession(fence.Config{Attacher: a})
	t.Cleanup(func() { s.Close() })
	return s, func(msg []byte) (wire.Reply, unix.Errno) {
		t.Helper()
		x := &exchange{msg: msg, done: make(chan struct{})}
		s.Submit(x, len(msg), 4096)
		<-x.done
		r, err := wire.Parse(x.reply)
		if err != nil {
			t.Fatal(err)
		}
		return r, unix.Errno(r.Errno())
	}
}

// TestSessionState takes a session with files in every condition and goes on
// with it on another server of the same folder: what names lead to is as it was,
// what is gone or replaced is ESTALE, and nothing else leads anywhere.
func TestSessionState(t *testing.T) {
	dir := t.TempDir()
	deep := strings.Repeat("d/", 40)
	if err := os.MkdirAll(dir+"/"+deep, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"read", "append", "renamed", "unlinked", "replaced", "target", "hostgone", deep + "leaf", "d/inside"} {
		write(t, dir+"/"+f, "text of "+f)
	}
	s, do := session(t, share(t, dir, rw))
	must := func(do func([]byte) (wire.Reply, unix.Errno), msg []byte) wire.Reply {
		t.Helper()
		r, errno := do(msg)
		if errno != 0 {
			t.Fatalf("message %d: %v", msg[4], errno)
		}
		return r
	}
	must(do, wire.Version(8192))
	must(do, wire.Attach(1, 0))
	open := func(fid uint32, flags uint32, names ...string) {
		t.Helper()
		must(do, wire.Walk(1, 0, fid, names...))
		must(do, wire.Open(1, fid, flags))
	}
	open(1, 0, "read")
	open(2, 1|0x400, "append")
	open(3, 0, "renamed")
	open(4, 2, "unlinked")
	open(5, 0, "replaced")
	open(6, 0, "target")
	open(7, 0, "hostgone")
	open(8, 0, "d", "inside")
	must(do, wire.Walk(1, 0, 9)) // the root again, not open
	at := uint32(0)
	for range 40 {
		must(do, wire.Walk(1, at, 10, "d"))
		at = 10
	}
	must(do, wire.Walk(1, 10, 10, "leaf"))
	must(do, wire.Walk(1, 0, 11))
	must(do, wire.Msg(wire.Tlcreate, 1, uint32(11), "made", uint32(0o102), uint32(0o644), uint32(0))) // O_CREAT|O_RDWR
	must(do, wire.Msg(wire.Trenameat, 1, uint32(0), "renamed", uint32(0), "elsewhere"))
	must(do, wire.Msg(wire.Tunlinkat, 1, uint32(0), "unlinked", uint32(0)))
	write(t, dir+"/new", "new")
	must(do, wire.Msg(wire.Trenameat, 1, uint32(0), "new", uint32(0), "target"))
	must(do, wire.Msg(wire.Trenameat, 1, uint32(0), "d", uint32(0), "e"))

	st, err := s.State()
	if err != nil {
		t.Fatal(err)
	}
	if r := must(do, wire.Read(1, 4, 0, 100)); string(r.Data()) != "text of unlinked" {
		t.Errorf("the session that was asked does not go on: %q", r.Data())
	}
	os.Remove(dir + "/hostgone")
	write(t, dir+"/other", "another file")
	if err := os.Rename(dir+"/other", dir+"/replaced"); err != nil {
		t.Fatal(err)
	}

	s2, do2 := session(t, share(t, dir, rw))
	stale, err := s2.Restore(st)
	if err != nil || stale != 4 {
		t.Fatalf("%d fids are stale, want 4 (%v)", stale, err)
	}
	for fid, want := range map[uint32]string{1: "text of read", 3: "text of renamed", 8: "text of d/inside", 11: ""} {
		if r := must(do2, wire.Read(1, fid, 0, 100)); string(r.Data()) != want {
			t.Errorf("fid %d reads %q, want %q", fid, r.Data(), want)
		}
	}
	must(do2, wire.Msg(wire.Twrite, 1, uint32(2), uint64(0), uint32(1), []byte("!")))
	if b, _ := os.ReadFile(dir + "/append"); string(b) != "text of append!" {
		t.Errorf("the file that was open for append has %q", b)
	}
	must(do2, wire.Open(1, 10, 0))
	if r := must(do2, wire.Read(1, 10, 0, 100)); string(r.Data()) != "text of "+deep+"leaf" {
		t.Errorf("the file below 40 folders, one of them renamed, reads %q", r.Data())
	}
	must(do2, wire.Walk(1, 9, 20, "elsewhere"))
	for _, fid := range []uint32{4, 5, 6, 7} {
		if _, errno := do2(wire.Read(1, fid, 0, 100)); errno != unix.ESTALE {
			t.Errorf("fid %d: %v, want ESTALE", fid, errno)
		}
		if _, errno := do2(wire.Walk(1, 0, fid, "read")); errno != unix.EINVAL {
			t.Errorf("fid %d can be made again while it is held: %v", fid, errno)
		}
		must(do2, wire.Clunk(1, fid))
		must(do2, wire.Walk(1, 0, fid, "read"))
	}
}

// TestSessionStateRefused: a state is input like any other.
func TestSessionStateRefused(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "text")
	for name, st := range map[string]fence.State{
		"twice":          {Msize: 8192, FIDs: []fence.FIDState{{FID: 1}, {FID: 1}}},
		"no fid":         {Msize: 8192, FIDs: []fence.FIDState{{FID: wire.NoFID}}},
		"small messages": {Msize: 17},
		"no version":     {FIDs: []fence.FIDState{{FID: 1}}},
	} {
		s, _ := session(t, share(t, dir, rw))
		if _, err := s.Restore(st); err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
	for name, path := range map[string]string{"out": "../f", "absolute": "/f", "dots": "./f", "empty name": "d//f", "NUL": "f\x00"} {
		s, do := session(t, share(t, dir, rw))
		stale, err := s.Restore(fence.State{Msize: 8192, FIDs: []fence.FIDState{{FID: 1, Path: []byte(path), Open: true}}})
		if err != nil || stale != 1 {
			t.Errorf("%s: %d stale, %v", name, stale, err)
		}
		if _, errno := do(wire.Read(1, 1, 0, 10)); errno != unix.ESTALE {
			t.Errorf("%s: %v", name, errno)
		}
	}
}
