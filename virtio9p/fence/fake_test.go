package fence

import (
	"io"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hugelgupf/p9/fsimpl/templatefs"
	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

// fakeFS is a file tree that counts. Below its root, and below "d", there is a
// file of every name that begins with f; reading "fblock" waits for release;
// asking for the attributes of "fpanic" once it is open panics.
type fakeFS struct {
	live    atomic.Int64 // files not closed
	opens   atomic.Int64
	running atomic.Int64 // calls under way
	most    atomic.Int64 // running while a rename was
	release chan struct{}
	reading chan struct{} // one value for each read that waits
	free    atomic.Bool   // whether locks are granted
	locking chan struct{} // one value for each lock that was not
}

func newFakeFS() *fakeFS {
	return &fakeFS{release: make(chan struct{}), reading: make(chan struct{}, 1000), locking: make(chan struct{}, 1000)}
}

func (fs *fakeFS) Attach() (p9.File, error) {
	fs.live.Add(1)
	return &fakeFile{fs: fs, dir: true}, nil
}

type fakeFile struct {
	templatefs.NoopFile
	fs     *fakeFS
	name   string
	dir    bool
	opened atomic.Bool
	closed atomic.Bool
}

func (f *fakeFile) enter() func() {
	f.fs.running.Add(1)
	return func() { f.fs.running.Add(-1) }
}

func (f *fakeFile) qid() p9.QID {
	q := p9.QID{Path: uint64(len(f.name)) + 1}
	if f.dir {
		q.Type = p9.TypeDir
	}
	return q
}

func (f *fakeFile) Walk(names []string) ([]p9.QID, p9.File, error) {
	defer f.enter()()
	to := &fakeFile{fs: f.fs, name: f.name, dir: f.dir}
	for _, n := range names {
		switch {
		case !f.dir:
			return nil, nil, linux.ENOTDIR
		case n == "d", strings.HasPrefix(n, "f"):
			to.name, to.dir = n, n == "d"
		default:
			return nil, nil, linux.ENOENT
		}
	}
	f.fs.live.Add(1)
	if len(names) == 0 {
		return nil, to, nil
	}
	return []p9.QID{to.qid()}, to, nil
}

func (f *fakeFile) GetAttr(p9.AttrMask) (p9.QID, p9.AttrMask, p9.Attr, error) {
	defer f.enter()()
	if f.name == "fpanic" && f.opened.Load() {
		panic("a file that panics")
	}
	mode := p9.ModeRegular | 0o444
	if f.dir {
		mode = p9.ModeDirectory | 0o555
	}
	if f.name == "flink" {
		mode = p9.ModeSymlink | 0o777
	}
	return f.qid(), p9.AttrMask{Mode: true}, p9.Attr{Mode: mode}, nil
}

func (f *fakeFile) Lock(pid int, _ p9.LockType, _ p9.LockFlags, _, _ uint64, _ string) (p9.LockStatus, error) {
	switch {
	case pid != 42:
		return p9.LockStatusError, linux.EINVAL
	case f.fs.free.Load():
		return p9.LockStatusOK, nil
	}
	select {
	case f.fs.locking <- struct{}{}:
	default:
	}
	return p9.LockStatusBlocked, nil
}

func (f *fakeFile) Open(p9.OpenFlags) (p9.QID, uint32, error) {
	defer f.enter()()
	f.opened.Store(true)
	f.fs.opens.Add(1)
	time.Sleep(time.Millisecond) // a chance for a second one to come in
	if f.name == "funit" {
		return f.qid(), 100, nil
	}
	return f.qid(), 0, nil
}

func (f *fakeFile) Create(name string, _ p9.OpenFlags, _ p9.FileMode, _ p9.UID, _ p9.GID) (p9.File, p9.QID, uint32, error) {
	_, to, err := f.Walk([]string{name})
	if err != nil {
		return nil, p9.QID{}, 0, err
	}
	qid, unit, err := to.Open(p9.ReadWrite)
	return to, qid, unit, err
}

func (f *fakeFile) ReadAt(p []byte, off int64) (int, error) {
	defer f.enter()()
	if f.name == "fblock" {
		f.fs.reading <- struct{}{}
		<-f.fs.release
	}
	for i := range p {
		p[i] = byte(off + int64(i))
	}
	return len(p), nil
}

func (f *fakeFile) WriteAt(p []byte, off int64) (int, error) { return len(p), nil }

func (f *fakeFile) Readdir(off uint64, count uint32) (p9.Dirents, error) {
	var ds p9.Dirents
	for i := range 10000 { // more than was asked for
		ds = append(ds, p9.Dirent{Offset: off + uint64(i) + 1, Name: "f"})
	}
	return ds, nil
}

func (f *fakeFile) RenameAt(string, p9.File, string) error {
	defer f.enter()()
	for range 5 {
		if n := f.fs.running.Load(); n > f.fs.most.Load() {
			f.fs.most.Store(n)
		}
		time.Sleep(10 * time.Microsecond)
	}
	return nil
}

func (f *fakeFile) UnlinkAt(name string, _ uint32) error {
	if name == "eperm" {
		return syscall.EPERM
	}
	return nil
}

func (f *fakeFile) Readlink() (string, error) { return strings.Repeat("x", 3000), nil }

func (f *fakeFile) Close() error {
	if f.closed.Swap(true) {
		panic("closed twice")
	}
	f.fs.live.Add(-1)
	return nil
}

// call is an Exchange that remembers.
type call struct {
	t     testing.TB
	msg   []byte
	room  int
	reply []byte
	done  chan struct{}
	dones atomic.Int32
}

func (c *call) Read(p []byte) (int, error) {
	if len(c.msg) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.msg)
	c.msg = c.msg[n:]
	return n, nil
}

func (c *call) Write(p []byte) (int, error) {
	if c.dones.Load() > 0 {
		c.t.Error("written to after Done")
	}
	c.reply = append(c.reply, p...)
	if len(c.reply) > c.room {
		c.t.Errorf("a reply of %d bytes where there is room for %d", len(c.reply), c.room)
	}
	return len(p), nil
}

func (c *call) Done() {
	if c.dones.Add(1) == 1 {
		close(c.done)
	} else {
		c.t.Error("Done was called twice")
	}
}

func submit(t testing.TB, s *Session, msg []byte, room int) *call {
	c := &call{t: t, msg: msg, room: room, done: make(chan struct{})}
	s.Submit(c, len(msg), room)
	return c
}

// wait returns the reply, which must come.
func (c *call) wait() wire.Reply {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(20 * time.Second):
		c.t.Fatal("no reply")
	}
	r, err := wire.Parse(c.reply)
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// roundTrip sends a message and expects a reply of its type, or an errno.
func roundTrip(t testing.TB, s *Session, msg []byte, wantErrno linux.Errno) wire.Reply {
	t.Helper()
	r := submit(t, s, msg, DefaultMsize).wait()
	switch {
	case r.Errno() != int(wantErrno):
		t.Fatalf("message %d: errno %d, want %d", msg[4], r.Errno(), wantErrno)
	case wantErrno == 0 && r.Type != msg[4]+1:
		t.Fatalf("message %d: answered by %d", msg[4], r.Type)
	}
	return r
}

// attached is a session with the root as fid 0.
func attached(t testing.TB, fs *fakeFS, cfg Config) *Session {
	t.Helper()
	cfg.Attacher = fs
	s := NewSession(cfg)
	t.Cleanup(func() {
		s.Close()
		if n := fs.live.Load(); n != 0 {
			t.Errorf("%d files were not closed", n)
		}
	})
	roundTrip(t, s, wire.Version(DefaultMsize), 0)
	roundTrip(t, s, wire.Attach(1, 0), 0)
	return s
}
