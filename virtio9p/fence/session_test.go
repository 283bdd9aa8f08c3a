package fence

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
	"go.uber.org/goleak"

	"github.com/moovm/moovm/virtio9p/virtio9ptest/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSession(t *testing.T) {
	fs := newFakeFS()
	s := attached(t, fs, Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "d", "file"), 0)
	roundTrip(t, s, wire.Getattr(2, 1), 0)
	roundTrip(t, s, wire.Open(3, 1, 0), 0)
	if got := roundTrip(t, s, wire.Read(4, 1, 7, 3), 0).Data(); !bytes.Equal(got, []byte{7, 8, 9}) {
		t.Errorf("read %v", got)
	}
	roundTrip(t, s, wire.Clunk(5, 1), 0)
	roundTrip(t, s, wire.Clunk(5, 1), linux.EBADF)
	roundTrip(t, s, wire.Walk(1, 0, 1, "nothing"), linux.ENOENT)
	roundTrip(t, s, wire.Walk(1, 0, 1), 0) // so the fid was not kept
}

// A Tflush of its own tag, and one of a tag that is not in use.
func TestFlushOwnTag(t *testing.T) {
	s := attached(t, newFakeFS(), Config{})
	roundTrip(t, s, wire.Flush(9, 9), 0)
	roundTrip(t, s, wire.Flush(9, 8), 0)
}

// Rflush comes after the reply to the old message, also through a chain of
// flushes, and two that name each other end.
func TestFlushOrder(t *testing.T) {
	fs := newFakeFS()
	s := attached(t, fs, Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "fblock"), 0)
	roundTrip(t, s, wire.Open(1, 1, 0), 0)
	read := submit(t, s, wire.Read(5, 1, 0, 100), 4096)
	<-fs.reading
	flush := submit(t, s, wire.Flush(6, 5), 4096)
	again := submit(t, s, wire.Flush(7, 6), 4096)
	cross := submit(t, s, wire.Flush(8, 7), 4096)
	back := submit(t, s, wire.Flush(9, 8), 4096)
	for _, c := range []*call{flush, again, cross, back} {
		select {
		case <-c.done:
			t.Fatal("a flush was answered before what it flushes")
		default:
		}
	}
	fs.release <- struct{}{}
	for i, c := range []*call{back, cross, again, flush, read} {
		if r := c.wait(); r.Errno() != 0 || int(r.Tag) != 9-i {
			t.Errorf("reply %+v", r)
		}
	}
}

// A Tread or Treaddir never makes a reply longer than its room or msize.
func TestCountClamped(t *testing.T) {
	s := attached(t, newFakeFS(), Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "f"), 0)
	roundTrip(t, s, wire.Open(1, 1, 0), 0)
	for _, room := range []int{11, 12, 100, 4096, 2 * DefaultMsize} {
		r := submit(t, s, wire.Read(2, 1, 0, 0xffffffff), room).wait()
		if want := min(room, DefaultMsize) - 11; len(r.Data()) != want {
			t.Errorf("room for %d: read %d bytes, want %d", room, len(r.Data()), want)
		}
	}
	roundTrip(t, s, wire.Walk(1, 0, 2), 0)
	roundTrip(t, s, wire.Open(1, 2, 0), 0)
	r := submit(t, s, wire.Readdir(2, 2, 0, 0xffffffff), 100).wait()
	if n := len(wire.Dirents(r.Data())); n != (100-11)/25 {
		t.Errorf("%d entries", n)
	}
	roundTrip(t, s, wire.Read(2, 1, 1<<63, 1), linux.EINVAL)
	roundTrip(t, s, wire.Read(2, 1, 1<<63-1, 100), linux.EINVAL)
}

// Files are read and written by whole pages, unless they know better.
func TestIOUnit(t *testing.T) {
	s := NewSession(Config{Attacher: newFakeFS()})
	t.Cleanup(func() { s.Close() })
	for msize, want := range map[uint32]uint32{DefaultMsize: 507904, 65536: 61440, 8192 + 24: 8192, 8192 + 23: 4096, MinMsize: 0} {
		roundTrip(t, s, wire.Version(msize), 0)
		roundTrip(t, s, wire.Attach(1, 0), 0)
		for name, want := range map[string]uint32{"f": want, "funit": 100} {
			roundTrip(t, s, wire.Walk(1, 0, 1, name), 0)
			opened := roundTrip(t, s, wire.Open(1, 1, 0), 0)
			roundTrip(t, s, wire.Walk(1, 0, 2), 0)
			created := roundTrip(t, s, wire.Msg(wire.Tlcreate, 1, uint32(2), name, uint32(2), uint32(0o644), uint32(0)), 0)
			for _, r := range []wire.Reply{opened, created} {
				if unit := binary.LittleEndian.Uint32(r.Body[qidLen:]); unit != want {
					t.Errorf("msize %d, %s: message %d says %d bytes, want %d", msize, name, r.Type, unit, want)
				}
			}
			roundTrip(t, s, wire.Clunk(1, 1), 0)
			roundTrip(t, s, wire.Clunk(1, 2), 0)
		}
	}
}

// A reply that cannot fit becomes an error, or nothing where not even that fits.
func TestRoom(t *testing.T) {
	s := attached(t, newFakeFS(), Config{})
	for room := range rlerrorLen {
		c := submit(t, s, wire.Getattr(1, 0), room)
		<-c.done
		if len(c.reply) != 0 {
			t.Errorf("room for %d: a reply of %d bytes", room, len(c.reply))
		}
	}
	if r := submit(t, s, wire.Getattr(1, 0), 100).wait(); r.Errno() != int(linux.EMSGSIZE) {
		t.Errorf("errno %d", r.Errno())
	}
	// What has an effect is refused before it has it.
	if r := submit(t, s, wire.Walk(1, 0, 1, "d", "f"), 11).wait(); r.Errno() != int(linux.EMSGSIZE) {
		t.Errorf("errno %d", r.Errno())
	}
	roundTrip(t, s, wire.Clunk(1, 1), linux.EBADF)
}

func TestDuplicateTag(t *testing.T) {
	fs := newFakeFS()
	s := attached(t, fs, Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "fblock"), 0)
	roundTrip(t, s, wire.Open(1, 1, 0), 0)
	read := submit(t, s, wire.Read(5, 1, 0, 100), 4096)
	<-fs.reading
	roundTrip(t, s, wire.Getattr(5, 0), linux.EBUSY)
	roundTrip(t, s, wire.Flush(5, 5), linux.EBUSY)
	roundTrip(t, s, wire.Getattr(6, 0), 0)
	fs.release <- struct{}{}
	if r := read.wait(); r.Errno() != 0 || len(r.Data()) != 100 {
		t.Errorf("errno %d, %d bytes", r.Errno(), len(r.Data()))
	}
	roundTrip(t, s, wire.Getattr(5, 0), 0)
}

func TestMalformed(t *testing.T) {
	s := attached(t, newFakeFS(), Config{})
	long := strings.Repeat("f", 256)
	for _, c := range []struct {
		what  string
		msg   []byte
		errno linux.Errno
	}{
		{"no body", wire.Msg(wire.Twalk, 3), linux.EINVAL},
		{"half a fid", wire.Msg(wire.Tclunk, 3, uint16(0)), linux.EINVAL},
		{"names missing", wire.Msg(wire.Twalk, 3, uint32(0), uint32(1), uint16(5)), linux.EINVAL},
		{"half a name", wire.Msg(wire.Twalk, 3, uint32(0), uint32(1), uint16(1), uint16(9), uint8('f')), linux.EINVAL},
		{"17 names", wire.Walk(3, 0, 1, strings.Split(strings.Repeat("d/", 16)+"f", "/")...), linux.EINVAL},
		{"long name", wire.Walk(3, 0, 1, long), linux.ENAMETOOLONG},
		{"NUL", wire.Walk(3, 0, 1, "f\x00f"), linux.EINVAL},
		{"slash", wire.Walk(3, 0, 1, "d/f"), linux.EINVAL},
		{"dot dot", wire.Walk(3, 0, 1, ".."), linux.EINVAL},
		{"empty name", wire.Walk(3, 0, 1, ""), linux.EINVAL},
		{"write without data", wire.Msg(wire.Twrite, 3, uint32(0), uint64(0), uint32(9)), linux.EINVAL},
		{"write with more data", wire.Msg(wire.Twrite, 3, uint32(0), uint64(0), uint32(1), []byte("data")), linux.EINVAL},
		{"write cut short", wire.Msg(wire.Twrite, 3, uint32(0), uint64(0)), linux.EINVAL},
		{"flush of nothing", wire.Msg(wire.Tflush, 3), linux.EINVAL},
		{"version of nothing", wire.Msg(wire.Tversion, 3), linux.EINVAL},
		{"huge body", wire.Msg(wire.Tgetattr, 3, make([]byte, 20000)), linux.EMSGSIZE},
		{"R-message", wire.Msg(wire.Tclunk+1, 3), linux.EOPNOTSUPP},
		{"unknown type", wire.Msg(255, 3, "who"), linux.EOPNOTSUPP},
		{"Rlerror", wire.Msg(7, 3, uint32(5)), linux.EOPNOTSUPP},
		{"Tauth", wire.Msg(wire.Tauth, 3, uint32(1), "", "", uint32(0)), linux.ENOENT},
		{"Tgetlock", wire.Msg(wire.Tgetlock, 3, uint32(0), uint8(0), uint64(0), uint64(0), uint32(1), "x"), linux.EOPNOTSUPP},
		{"Txattrwalk", wire.Msg(wire.Txattrwalk, 3, uint32(0), uint32(5), "user.x"), linux.EOPNOTSUPP},
		{"Txattrcreate", wire.Msg(wire.Txattrcreate, 3, uint32(0), "user.x", uint64(1<<40), uint32(0)), linux.EOPNOTSUPP},
		{"Twalkgetattr", wire.Msg(126, 3, uint32(0), uint32(5), []string{}), linux.EOPNOTSUPP},
		{"NOFID", wire.Walk(3, 0, wire.NoFID), linux.EINVAL},
		{"fid in use", wire.Attach(3, 0), linux.EINVAL},
		{"no such fid", wire.Read(3, 77, 0, 1), linux.EBADF},
		{"read of what is not open", wire.Read(3, 0, 0, 1), linux.EINVAL},
	} {
		r := submit(t, s, c.msg, 8192).wait()
		if r.Errno() != int(c.errno) || r.Tag != 3 {
			t.Errorf("%s: errno %d, tag %d; want errno %d, tag 3", c.what, r.Errno(), r.Tag, c.errno)
		}
	}
	// A header that lies, and one that is not whole.
	for _, size := range []uint32{0, 6, 100, 1 << 31, 1<<32 - 1} {
		msg := wire.Getattr(3, 0)
		binary.LittleEndian.PutUint32(msg, size)
		if r := submit(t, s, msg, 8192).wait(); r.Errno() != int(linux.EINVAL) {
			t.Errorf("size %d: errno %d", size, r.Errno())
		}
	}
	for n := range headerLen {
		c := submit(t, s, wire.Getattr(3, 0)[:n], 8192)
		<-c.done
		if len(c.reply) != 0 {
			t.Errorf("%d bytes of a header were answered", n)
		}
	}
	// Bytes behind the message are somebody's padding.
	roundTrip(t, s, wire.Msg(wire.Tfsync, 3, uint32(0), uint32(1)), linux.EINVAL)
	if r := submit(t, s, append(wire.Getattr(3, 0), 1, 2, 3), 8192).wait(); r.Errno() != 0 {
		t.Errorf("padding: errno %d", r.Errno())
	}
}

func TestVersion(t *testing.T) {
	fs := newFakeFS()
	s := NewSession(Config{Attacher: fs})
	defer s.Close()
	roundTrip(t, s, wire.Attach(1, 0), linux.EPROTO)
	for _, c := range []struct {
		ask   uint32
		name  string
		msize uint32
		got   string
		errno linux.Errno
	}{
		{8192, "9P2000.L", 8192, "9P2000.L", 0},
		{1 << 31, "9P2000.L", DefaultMsize, "9P2000.L", 0},
		{4096, "9P2000.L.Google.7", 4096, "9P2000.L", 0},
		{8192, "9P2000.u", 0, "unknown", 0},
		{8192, "", 0, "unknown", 0},
		{4095, "9P2000.L", 0, "", linux.EMSGSIZE},
		{0, "9P2000.L", 0, "", linux.EMSGSIZE},
	} {
		r := roundTrip(t, s, wire.Msg(wire.Tversion, wire.NoTag, c.ask, c.name), c.errno)
		if want := wire.Msg(wire.Tversion+1, wire.NoTag, c.msize, c.got)[7:]; c.errno == 0 && !bytes.Equal(r.Body, want) {
			t.Errorf("%+v: %q, want %q", c, r.Body, want)
		}
	}
	roundTrip(t, s, wire.Attach(1, 0), linux.EPROTO) // the last one was refused
	roundTrip(t, s, wire.Version(4096), 0)
	roundTrip(t, s, wire.Attach(1, 0), 0)
	roundTrip(t, s, wire.Walk(1, 0, 1, "f"), 0)
	roundTrip(t, s, wire.Open(1, 1, 0), 0)
	if n := len(roundTrip(t, s, wire.Read(1, 1, 0, 1<<20), 0).Data()); n != 4096-11 {
		t.Errorf("read %d bytes with an msize of 4096", n)
	}
	if r := submit(t, s, wire.Write(1, 1, 0, make([]byte, 4096)), 8192).wait(); r.Errno() != int(linux.EMSGSIZE) {
		t.Errorf("a message longer than msize: errno %d", r.Errno())
	}
	roundTrip(t, s, wire.Version(4096), 0)
	if n := fs.live.Load(); n != 0 {
		t.Errorf("Tversion left %d files open", n)
	}
	roundTrip(t, s, wire.Read(1, 1, 0, 1), linux.EBADF)
}

// Tversion while requests are under way waits for them.
func TestVersionDrains(t *testing.T) {
	fs := newFakeFS()
	s := attached(t, fs, Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "fblock"), 0)
	roundTrip(t, s, wire.Open(1, 1, 0), 0)
	var reads []*call
	for i := range 100 {
		reads = append(reads, submit(t, s, wire.Read(uint16(i), 1, 0, 10000), 4096))
	}
	go close(fs.release)
	roundTrip(t, s, wire.Version(8192), 0)
	for _, c := range reads {
		select {
		case <-c.done:
		default:
			t.Fatal("Rversion overtook a reply")
		}
		if r := c.wait(); len(r.Data()) != 4096-11 {
			t.Errorf("read %d bytes", len(r.Data()))
		}
	}
}

func TestFIDLimit(t *testing.T) {
	s := attached(t, newFakeFS(), Config{MaxFIDs: 10})
	for fid := uint32(1); fid < 10; fid++ {
		roundTrip(t, s, wire.Walk(1, 0, fid, "f"), 0)
	}
	roundTrip(t, s, wire.Walk(1, 0, 10, "f"), linux.ENFILE)
	roundTrip(t, s, wire.Attach(1, 10), linux.ENFILE)
	roundTrip(t, s, wire.Walk(1, 1, 1), 0) // in place: needs no more
	roundTrip(t, s, wire.Clunk(1, 5), 0)
	roundTrip(t, s, wire.Msg(wire.Tremove, 1, uint32(6)), 0)
	roundTrip(t, s, wire.Walk(1, 0, 10, "nothing"), linux.ENOENT)
	roundTrip(t, s, wire.Walk(1, 0, 5, "f"), 0)
	roundTrip(t, s, wire.Walk(1, 0, 6, "f"), 0)
	roundTrip(t, s, wire.Walk(1, 0, 10, "f"), linux.ENFILE)
}

// However many Tlopen of a fid come at once, the file is opened once.
func TestOpenOnce(t *testing.T) {
	fs := newFakeFS()
	s := attached(t, fs, Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "f"), 0)
	var calls []*call
	for i := range 20 {
		calls = append(calls, submit(t, s, wire.Open(uint16(i), 1, 0), 4096))
		calls = append(calls, submit(t, s, wire.Read(uint16(100+i), 1, 0, 10), 4096))
	}
	opened := 0
	for _, c := range calls {
		if c.wait().Type == wire.Tlopen+1 {
			opened++
		}
	}
	if opened != 1 || fs.opens.Load() != 1 {
		t.Errorf("%d replies, %d opens", opened, fs.opens.Load())
	}
}

// A rename has the server to itself: nothing is clunked meanwhile.
func TestRenameAlone(t *testing.T) {
	fs := newFakeFS()
	s := attached(t, fs, Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "d"), 0)
	var calls []*call
	for i := range 20 {
		tag := uint16(10 * i)
		fid := uint32(100 + i)
		roundTrip(t, s, wire.Walk(1, 1, fid, "f"), 0)
		calls = append(calls,
			submit(t, s, wire.Getattr(tag+1, fid), 4096),
			submit(t, s, wire.Msg(wire.Trenameat, tag+2, uint32(1), "f", uint32(1), "f2"), 4096),
			submit(t, s, wire.Msg(wire.Trenameat, tag+3, uint32(1), "f2", uint32(1), "f"), 4096),
			submit(t, s, wire.Clunk(tag+4, fid), 4096))
	}
	for _, c := range calls {
		if r := c.wait(); r.Errno() != 0 {
			t.Errorf("errno %d", r.Errno())
		}
	}
	if n := fs.most.Load(); n != 1 {
		t.Errorf("%d calls at once during a rename", n)
	}
}

// Errors keep their number; and names nobody has do not fill the memory.
func TestUnlinkErrors(t *testing.T) {
	s := attached(t, newFakeFS(), Config{})
	bad := wire.Msg(wire.Tunlinkat, 1, uint32(0), "eperm", uint32(0))
	roundTrip(t, s, bad, linux.EPERM)
	for range 10 {
		roundTrip(t, s, bad, linux.EPERM)
	}
	s.mu.Lock()
	if s.lost != 11 {
		t.Errorf("%d names counted, want 11", s.lost)
	}
	s.lost = maxLost - 1
	s.mu.Unlock()
	roundTrip(t, s, bad, linux.EPERM)
	roundTrip(t, s, bad, linux.ENOMEM)
	roundTrip(t, s, wire.Msg(wire.Tunlinkat, 1, uint32(0), "f", uint32(0)), linux.ENOMEM)
	roundTrip(t, s, wire.Version(8192), 0)
	roundTrip(t, s, wire.Attach(1, 0), 0)
	roundTrip(t, s, wire.Msg(wire.Tunlinkat, 1, uint32(0), "f", uint32(0)), 0)
	roundTrip(t, s, bad, linux.EPERM)
}

// A file that panics fails that request, and is heard of once.
func TestPanic(t *testing.T) {
	var log syncBuffer
	s := attached(t, newFakeFS(), Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	roundTrip(t, s, wire.Walk(1, 0, 1, "fpanic"), 0)
	roundTrip(t, s, wire.Open(1, 1, 0), 0)
	for range 10 {
		roundTrip(t, s, wire.Getattr(1, 1), linux.EFAULT)
	}
	if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
		t.Errorf("%d errors logged", n)
	}
	roundTrip(t, s, wire.Getattr(1, 0), 0)
}

// An exchange whose data goes missing fails, and nothing else does.
func TestBrokenExchange(t *testing.T) {
	fs := newFakeFS()
	s := attached(t, fs, Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "f"), 0)
	roundTrip(t, s, wire.Open(1, 1, 2), 0)
	msg := wire.Write(7, 1, 0, make([]byte, 100))
	c := &call{t: t, msg: msg[:50], room: 100, done: make(chan struct{})}
	s.Submit(c, len(msg), 100)
	if r := c.wait(); r.Errno() != int(linux.EIO) || r.Tag != 7 {
		t.Errorf("%+v", r)
	}
	roundTrip(t, s, wire.Write(7, 1, 0, make([]byte, 100)), 0)
	roundTrip(t, s, wire.Getattr(1, 0), 0)
}

// A reply that turns out too long, and a Twrite, whose payload is not copied first.
func TestLongReplyAndWrite(t *testing.T) {
	s := attached(t, newFakeFS(), Config{})
	roundTrip(t, s, wire.Walk(1, 0, 1, "f"), 0)
	roundTrip(t, s, wire.Open(1, 1, 1), 0)
	r := roundTrip(t, s, wire.Write(1, 1, 0, make([]byte, 100_000)), 0)
	if n := binary.LittleEndian.Uint32(r.Body); n != 100_000 {
		t.Errorf("wrote %d bytes", n)
	}
	roundTrip(t, s, wire.Write(1, 1, 1<<63-4, make([]byte, 5)), linux.EINVAL)

	roundTrip(t, s, wire.Walk(1, 0, 2, "flink"), 0)
	if n := len(roundTrip(t, s, wire.Msg(wire.Treadlink, 1, uint32(2)), 0).Body); n != 3002 {
		t.Errorf("a link of %d bytes", n)
	}
	if r := submit(t, s, wire.Msg(wire.Treadlink, 1, uint32(2)), 3000).wait(); r.Errno() != int(linux.EMSGSIZE) {
		t.Errorf("errno %d", r.Errno())
	}
	roundTrip(t, s, wire.Clunk(1, 2), 0)
}

func TestCloseIsIdempotent(t *testing.T) {
	s := NewSession(Config{Attacher: newFakeFS()})
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	roundTrip(t, s, wire.Version(8192), 0)
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// FuzzSession sends a stream of messages, each with a room for its reply, and
// expects every one to be answered exactly once, by something that fits.
func FuzzSession(f *testing.F) {
	seed := func(msgs ...[]byte) {
		var b []byte
		for _, m := range msgs {
			b = binary.LittleEndian.AppendUint16(b, 300) // room
			b = binary.LittleEndian.AppendUint16(b, uint16(len(m)))
			b = append(b, m...)
		}
		f.Add(b)
	}
	start := [][]byte{wire.Version(8192), wire.Attach(1, 0)}
	seed(start...)
	seed(append(start, wire.Walk(1, 0, 1, "d", "f"), wire.Open(2, 1, 0), wire.Read(3, 1, 0, 4096), wire.Flush(4, 3), wire.Clunk(5, 1), wire.Version(4096))...)
	seed(append(start, wire.Walk(1, 0, 1), wire.Open(1, 1, 0), wire.Readdir(2, 1, 0, 200), wire.Getattr(2, 1), wire.Msg(wire.Tstatfs, 9, uint32(0)))...)
	seed(append(start, wire.Walk(1, 0, 1, "f"), wire.Msg(wire.Tlcreate, 1, uint32(0), "f", uint32(2), uint32(0o644), uint32(0)),
		wire.Msg(wire.Trename, 4, uint32(1), uint32(0), "f9"), wire.Msg(wire.Trenameat, 4, uint32(0), "f9", uint32(0), "f"),
		wire.Msg(wire.Tunlinkat, 4, uint32(0), "f", uint32(0)), wire.Msg(wire.Tremove, 4, uint32(1)), wire.Write(5, 1, 0, []byte("data")))...)
	seed(append(start, wire.Msg(wire.Tmkdir, 1, uint32(0), "f", uint32(0), uint32(0)), wire.Msg(wire.Tsymlink, 1, uint32(0), "f", "t", uint32(0)),
		wire.Msg(wire.Tlink, 1, uint32(0), uint32(0), "f"), wire.Msg(wire.Tmknod, 1, uint32(0), "f", uint32(0), uint32(0), uint32(0), uint32(0)),
		wire.Msg(wire.Tlock, 1, uint32(0), uint8(0), uint32(0), uint64(0), uint64(0), uint32(1), "c"), wire.Msg(wire.Treadlink, 1, uint32(0)),
		wire.Msg(wire.Tsetattr, 1, uint32(0), make([]byte, 56)), wire.Msg(wire.Tfsync, 1, uint32(0)))...)
	f.Fuzz(func(t *testing.T, b []byte) {
		fs := newFakeFS()
		close(fs.release)
		var a p9.Attacher = fs
		inPlace := len(b)%2 == 1
		if inPlace {
			a = &vectorFS{fakeFS: fs, data: make([]byte, 1000), resident: len(b)%4 == 1}
		}
		s := NewSession(Config{Attacher: a, MaxFIDs: 16})
		var calls []*call
		for len(b) >= 4 && len(calls) < 200 {
			room := int(binary.LittleEndian.Uint16(b))
			n := min(int(binary.LittleEndian.Uint16(b[2:])), len(b)-4)
			msg := b[4 : 4+n]
			b = b[4+n:]
			if inPlace {
				c := newSpanCall(t, msg, room)
				s.Submit(c, len(msg), room)
				calls = append(calls, &c.call)
				continue
			}
			calls = append(calls, submit(t, s, msg, room))
		}
		s.Close()
		for _, c := range calls {
			select {
			case <-c.done:
			default:
				t.Fatal("unanswered after Close")
			}
			if len(c.reply) == 0 {
				continue
			}
			if _, err := wire.Parse(c.reply); err != nil {
				t.Fatal(err)
			}
		}
		if n := fs.live.Load(); n != 0 {
			t.Fatalf("%d files were not closed", n)
		}
	})
}

func BenchmarkGetattr(b *testing.B) {
	s := attached(b, newFakeFS(), Config{})
	msg := wire.Getattr(1, 0)
	b.ReportAllocs()
	for b.Loop() {
		submit(b, s, msg, 4096).wait()
	}
}
