package fence

import (
	"bytes"
	"errors"
	"io"
	"sync"
	"testing"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

// vectorFS is a tree of one file that can be read and written in pieces.
type vectorFS struct {
	*fakeFS
	mu      sync.Mutex
	data    []byte
	pieces  int   // of the last call
	err     error // what the next calls return
	panics  bool
	nothing bool // the next calls claim more than there was

	resident bool // the next reads need not wait
	atOnce   int  // reads that did not
}

func (fs *vectorFS) Attach() (p9.File, error) {
	f, err := fs.fakeFS.Attach()
	return &vectorFile{f.(*fakeFile), fs}, err
}

type vectorFile struct {
	*fakeFile
	vfs *vectorFS
}

func (f *vectorFile) Walk(names []string) ([]p9.QID, p9.File, error) {
	qids, to, err := f.fakeFile.Walk(names)
	if err != nil {
		return nil, nil, err
	}
	return qids, &vectorFile{to.(*fakeFile), f.vfs}, nil
}

func (f *vectorFile) ReadAt([]byte, int64) (int, error)  { return 0, errors.New("in one piece") }
func (f *vectorFile) WriteAt([]byte, int64) (int, error) { return 0, errors.New("in one piece") }

func (f *vectorFile) ReadvAt(bufs [][]byte, off int64) (int, error) {
	f.vfs.mu.Lock()
	defer f.vfs.mu.Unlock()
	f.vfs.pieces = len(bufs)
	if f.vfs.panics {
		panic("a file that panics")
	}
	n := 0
	for _, b := range bufs {
		n += copy(b, f.vfs.data[min(int64(len(f.vfs.data)), off+int64(n)):])
	}
	if f.vfs.nothing {
		n = 1 << 40
	}
	return n, f.vfs.err
}

func (f *vectorFile) ReadvResident(bufs [][]byte, off int64) bool {
	f.vfs.mu.Lock()
	defer f.vfs.mu.Unlock()
	for _, b := range bufs {
		if off > int64(len(f.vfs.data)-len(b)) {
			return false
		}
		off += int64(copy(b, f.vfs.data[off:]))
	}
	if f.vfs.resident {
		f.vfs.atOnce++
	}
	return f.vfs.resident
}

func (f *vectorFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	f.vfs.mu.Lock()
	defer f.vfs.mu.Unlock()
	f.vfs.pieces = len(bufs)
	n := 0
	for _, b := range bufs {
		n += copy(f.vfs.data[min(int64(len(f.vfs.data)), off+int64(n)):], b)
	}
	return n, f.vfs.err
}

// spanCall is a call whose memory can be had in pieces of a few bytes.
type spanCall struct {
	call
	memory  []byte // of the reply
	taken   int
	offered int // the end of what could be written to
}

func newSpanCall(t testing.TB, msg []byte, room int) *spanCall {
	return &spanCall{call: call{t: t, msg: bytes.Clone(msg), room: room, done: make(chan struct{})}, memory: bytes.Repeat([]byte{0xee}, room)}
}

func (c *spanCall) span(b []byte, dst [][]byte) [][]byte {
	for len(b) > 0 {
		n := min(len(b), 5)
		dst = append(dst, b[:n:n])
		b = b[n:]
	}
	return dst
}

func (c *spanCall) Readable(n int, dst [][]byte) ([][]byte, error) {
	if n > len(c.msg) {
		return dst, io.ErrUnexpectedEOF
	}
	dst = c.span(c.msg[:n], dst)
	c.msg = c.msg[n:]
	return dst, nil
}

func (c *spanCall) Writable(skip, n int, dst [][]byte) ([][]byte, error) {
	if c.taken+skip+n > c.room {
		return dst, io.ErrShortWrite
	}
	c.offered = c.taken + skip + n
	return c.span(c.memory[c.taken+skip:c.offered], dst), nil
}

func (c *spanCall) Wrote(n int) {
	if c.dones.Load() > 0 {
		c.t.Error("written to after Done")
	}
	if c.taken += n; c.taken > c.room {
		c.t.Errorf("a reply of %d bytes where there is room for %d", c.taken, c.room)
	}
	c.reply = c.memory[:c.taken]
}

func (c *spanCall) Write(p []byte) (int, error) {
	n := copy(c.memory[c.taken:], p)
	c.Wrote(len(p))
	return n, nil
}

// Contents go to and from the client's memory without the server in between;
// what it is told is exact, whatever the file does.
func TestInPlace(t *testing.T) {
	fs := &vectorFS{fakeFS: newFakeFS(), data: bytes.Repeat([]byte("0123456789"), 100)}
	do := spanSession(t, fs)
	do(wire.Version(8192), 100)
	do(wire.Attach(1, 0), 100)
	do(wire.Walk(1, 0, 1, "f"), 200)
	if r := do(wire.Read(1, 1, 0, 10), 200); r.Errno() != int(linux.EINVAL) {
		t.Errorf("before the open: errno %d", r.Errno())
	}
	do(wire.Open(1, 1, 2), 100)
	for _, c := range []struct{ off, count, room, want int }{
		{0, 10, 200, 10}, {3, 100, 200, 100}, {7, 1000, 50, 39}, {995, 100, 200, 5}, {1000, 10, 200, 0}, {5000, 10, 200, 0}, {0, 0, 200, 0}, {0, 10, 11, 0},
	} {
		r := do(wire.Read(9, 1, uint64(c.off), uint32(c.count)), c.room)
		end := min(c.off+c.want, 1000)
		if r.Type != wire.Tread+1 || r.Tag != 9 || !bytes.Equal(r.Data(), fs.data[min(c.off, end):end]) || len(r.Body) != 4+c.want {
			t.Errorf("%+v: %+v", c, r)
		}
	}
	if do(wire.Read(9, 1, 0, 100), 200); fs.pieces != 20 {
		t.Errorf("read in %d pieces", fs.pieces)
	}
	if r := do(wire.Write(9, 1, 2, []byte("written in pieces")), 100); r.Errno() != 0 || fs.pieces != 4 || !bytes.HasPrefix(fs.data, []byte("01written in pieces9")) {
		t.Errorf("%+v; %q in %d pieces", r, fs.data[:25], fs.pieces)
	}
	if r := do(wire.Write(9, 1, 990, make([]byte, 30)), 100); r.Errno() != 0 || r.Body[0] != 10 {
		t.Errorf("a short write: %+v", r)
	}
	fs.err = io.EOF
	if r := do(wire.Read(9, 1, 0, 10), 200); len(r.Data()) != 10 {
		t.Errorf("with EOF: %+v", r)
	}
	fs.err = linux.EDQUOT
	if r := do(wire.Read(9, 1, 0, 10), 200); len(r.Data()) != 10 {
		t.Errorf("an error after some bytes: %+v", r)
	}
	if r := do(wire.Read(9, 1, 1000, 10), 200); r.Errno() != int(linux.EDQUOT) || r.Tag != 9 {
		t.Errorf("an error: %+v", r)
	}
	if r := do(wire.Write(9, 1, 1000, []byte("x")), 200); r.Errno() != int(linux.EDQUOT) {
		t.Errorf("an error of a write: %+v", r)
	}
	fs.err, fs.nothing = nil, true
	if r := do(wire.Read(9, 1, 0, 10), 200); len(r.Data()) != 10 {
		t.Errorf("a file that lies: %+v", r)
	}
	fs.nothing, fs.panics = false, true
	if r := do(wire.Read(9, 1, 0, 10), 200); r.Errno() != int(linux.EFAULT) {
		t.Errorf("a panic: %+v", r)
	}
	fs.panics = false
	if r := do(wire.Read(9, 1, 0, 10), 200); len(r.Data()) != 10 {
		t.Errorf("after the panic: %+v", r)
	}
}

// spanSession returns how to ask a new session for something, with so much
// room for the reply.
func spanSession(t *testing.T, fs *vectorFS) (do func(msg []byte, room int) wire.Reply) {
	t.Helper()
	s := NewSession(Config{Attacher: fs})
	t.Cleanup(func() {
		// An exchange without memory to show needs the other methods.
		if r := submit(t, s, wire.Read(3, 1, 0, 10), 200).wait(); r.Errno() == 0 {
			t.Errorf("a file without ReadAt: %+v", r)
		}
		s.Close()
		if n := fs.live.Load(); n != 0 {
			t.Errorf("%d files were not closed", n)
		}
	})
	return func(msg []byte, room int) wire.Reply {
		t.Helper()
		c := newSpanCall(t, msg, room)
		s.Submit(c, len(msg), room)
		r := c.wait()
		if rest := c.memory[max(c.taken, c.offered):]; len(bytes.Trim(rest, "\xee")) > 0 {
			t.Error("memory behind the room was written to")
		}
		return r
	}
}

// What is in memory is read without the server, of a fid that it has let be
// read, as long as that is the fid it was.
func TestResident(t *testing.T) {
	fs := &vectorFS{fakeFS: newFakeFS(), data: bytes.Repeat([]byte("0123456789"), 100), resident: true}
	do := spanSession(t, fs)
	want := func(what string, errno linux.Errno, atOnce int) {
		t.Helper()
		r := do(wire.Read(7, 1, 3, 40), 200)
		if r.Errno() != int(errno) || r.Tag != 7 || errno == 0 && (r.Type != wire.Tread+1 || !bytes.Equal(r.Data(), fs.data[3:43]) || len(r.Body) != 44) {
			t.Errorf("%s: %+v", what, r)
		}
		if fs.atOnce != atOnce {
			t.Errorf("%s: %d reads at once, want %d", what, fs.atOnce, atOnce)
		}
	}
	version := func() {
		t.Helper()
		do(wire.Version(8192), 100)
		do(wire.Attach(1, 0), 100)
		do(wire.Walk(1, 0, 1, "f"), 200)
	}
	version()
	want("not open", linux.EINVAL, 0)
	do(wire.Open(1, 1, 0), 100)
	want("the first", 0, 0)
	want("the second", 0, 1)
	want("the third", 0, 2)
	fs.resident = false
	want("one that has to wait", 0, 2)
	fs.resident = true
	want("and after it", 0, 3)
	if r := do(wire.Read(7, 1, 990, 40), 200); len(r.Data()) != 10 || fs.atOnce != 3 {
		t.Errorf("at the end: %+v, %d at once", r, fs.atOnce)
	}
	if r := do(wire.Read(7, 1, 0, 1000), 50); len(r.Data()) != 39 || fs.atOnce != 4 {
		t.Errorf("little room: %+v, %d at once", r, fs.atOnce)
	}

	do(wire.Clunk(1, 1), 100)
	want("a fid that is gone", linux.EBADF, 4)
	do(wire.Walk(1, 0, 1, "f"), 200)
	want("a new fid of that number", linux.EINVAL, 4)
	do(wire.Open(1, 1, 1), 100)
	want("open for writing", linux.EPERM, 4)
	do(wire.Walk(1, 1, 2), 200)
	do(wire.Open(1, 2, 0), 100)
	do(wire.Clunk(1, 1), 100)
	do(wire.Walk(1, 2, 1), 200) // refused: fid 2 is open
	do(wire.Walk(1, 0, 1, "f"), 200)
	do(wire.Open(1, 1, 0), 100)
	want("the first of another file", 0, 4)
	want("the second of another file", 0, 5)
	do(wire.Msg(wire.Tremove, 1, uint32(1)), 100)
	want("a fid that was removed", linux.EBADF, 5)
	do(wire.Walk(1, 0, 1, "f"), 200)
	do(wire.Open(1, 1, 0), 100)
	want("once more", 0, 5)
	want("once more, at once", 0, 6)
	do(wire.Version(8192), 100)
	want("right after Tversion", linux.EBADF, 6)
	version()
	want("after Tversion", linux.EINVAL, 6)
}
