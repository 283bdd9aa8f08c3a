package filefs

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/virtiotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// client is a driver that sends requests one by one.
type client struct {
	t *testing.T
	g *virtiotest.Guest
	d *virtiotest.Driver

	in, out       uint64 // places in guest memory
	inMem, outMem []byte
}

const clientRoom = 128 << 10

// newClient serves files with the contents.
func newClient(t *testing.T, contents ...string) (*client, []*os.File) {
	t.Helper()
	var files []*os.File
	dir := t.TempDir()
	for i, content := range contents {
		f, err := os.OpenFile(filepath.Join(dir, string(rune('a'+i))), os.O_RDWR|os.O_CREATE, 0o640)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if _, err := f.WriteString(content); err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	dev, err := New("tag", files)
	if err != nil {
		t.Fatal(err)
	}
	g := virtiotest.NewGuest(1 << 20)
	m, err := virtiotest.NewMMIO(dev, g, mmio.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	c := &client{t: t, g: g, d: virtiotest.Start(t, m, g, virtio.FeatureVersion1, 16)}
	c.in, c.inMem = g.Alloc(clientRoom, 4096)
	c.out, c.outMem = g.Alloc(clientRoom, 4096)
	return c, files
}

// send sends a request to the request queue and returns the answer's errno and
// what follows its header. The answer may have room bytes in all.
func (c *client) send(op uint32, node uint64, room int, body []byte) (unix.Errno, []byte) {
	c.t.Helper()
	e := encoder{}
	e.u32(uint32(inHeaderSize + len(body)))
	e.u32(op)
	e.u64(77) // unique
	e.u64(node)
	e.zeros(16)
	n := copy(c.inMem, append(e.b, body...))
	clear(c.outMem)
	used := c.d.Do(1, virtiotest.Buf{Addr: c.in, Len: uint32(n)}, virtiotest.Buf{Addr: c.out, Len: uint32(room), Write: true})
	if used < outHeaderSize {
		c.t.Fatalf("operation %d: an answer of %d bytes", op, used)
	}
	out := decoder{b: c.outMem[:used]}
	n32, errno, unique := out.u32(), -int32(out.u32()), out.u64()
	if n32 != used || unique != 77 {
		c.t.Fatalf("operation %d: the header says %d bytes, for %d; %d came", op, n32, unique, used)
	}
	return unix.Errno(errno), out.b
}

// must sends a request that succeeds.
func (c *client) must(op uint32, node uint64, body []byte) *decoder {
	c.t.Helper()
	errno, b := c.send(op, node, clientRoom, body)
	if errno != 0 {
		c.t.Fatalf("operation %d: %v", op, errno)
	}
	return &decoder{b: b}
}

// fields are 64-bit numbers, and 32-bit ones where they are int32 or uint32.
func fields(values ...any) (b []byte) {
	for _, v := range values {
		if n, ok := v.(int); ok {
			v = int64(n)
		}
		b, _ = binary.Append(b, binary.LittleEndian, v)
	}
	return b
}

func (c *client) rw(off int64, size int) []byte {
	return fields(0, off, uint32(size), uint32(0), 0, uint32(0), uint32(0))
}

func TestConfig(t *testing.T) {
	d, err := New("tag", nil)
	if err != nil {
		t.Fatal(err)
	}
	want := append([]byte("tag"), make([]byte, 37)...)
	want[36] = 1
	got := bytes.Repeat([]byte{9}, 44)
	d.ReadConfig(0, got)
	if !bytes.Equal(got, append(want, 0, 0, 0, 0)) || d.ID() != 26 || len(d.QueueSizes()) != 2 {
		t.Errorf("configuration %q, device %d, queues %d", got, d.ID(), d.QueueSizes())
	}
	for _, tag := range []string{"", string(make([]byte, 37))} {
		if _, err := New(tag, nil); err == nil {
			t.Errorf("tag %q is taken", tag)
		}
	}
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if _, err := New("tag", []*os.File{dir}); err == nil {
		t.Error("a folder is taken for a file")
	}
}

func TestFiles(t *testing.T) {
	c, files := newClient(t, "first", string(bytes.Repeat([]byte("x"), 64<<10)))
	in := c.must(opInit, 0, fields(uint32(7), uint32(36), uint32(4096), uint32(0xffffffff)))
	if major, minor := in.u32(), in.u32(); major != 7 || minor != 31 || len(in.b) != 56 {
		t.Errorf("version %d.%d, %d bytes more", major, minor, len(in.b))
	}
	for name, want := range map[string]uint64{"0": 2, "1": 3} {
		if node := c.must(opLookup, rootNode, append([]byte(name), 0)).u64(); node != want {
			t.Errorf("%q is node %d", name, node)
		}
	}
	for _, name := range []string{"", "2", "-1", "00", "+1", ".", "..", "a", "1/..", "99999999999999999999"} {
		if errno, _ := c.send(opLookup, rootNode, clientRoom, append([]byte(name), 0)); errno != unix.ENOENT {
			t.Errorf("%q: %v", name, errno)
		}
	}
	if got := c.must(opRead, 2, c.rw(1, 100)).b; string(got) != "irst" {
		t.Errorf("read %q", got)
	}
	if n := c.must(opWrite, 2, append(c.rw(5, 3), "ish"...)).u32(); n != 3 {
		t.Errorf("%d of 3 bytes written", n)
	}
	c.must(opFsync, 2, fields(0, uint32(1), uint32(0)))
	c.must(opFallocate, 3, fields(0, 8<<10, 48<<10, uint32(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE), uint32(0)))
	attr := c.must(opGetattr, 3, fields(uint32(0), uint32(0), 0))
	attr.take(16)
	if node, size, blocks := attr.u64(), attr.u64(), attr.u64(); node != 3 || size != 64<<10 || blocks*512 > 32<<10 {
		t.Errorf("after the hole: node %d of %d bytes, %d blocks", node, size, blocks)
	}
	if data := c.must(opLseek, 3, fields(0, 8<<10, uint32(unix.SEEK_DATA), uint32(0))).u64(); data != 56<<10 {
		t.Errorf("data from %d on", data)
	}
	if errno, _ := c.send(opLseek, 3, clientRoom, fields(0, 64<<10, uint32(unix.SEEK_DATA), uint32(0))); errno != unix.ENXIO {
		t.Errorf("data beyond the end: %v", errno)
	}
	times := func(valid uint32, size, mtime int) []byte {
		return append(fields(valid, uint32(0), 0, size, 0, 0, mtime, 0), make([]byte, 32)...)
	}
	c.must(opSetattr, 2, times(setSize|setMtime, 6, 1000))
	if st, err := files[0].Stat(); err != nil || st.Size() != 6 || st.ModTime().Unix() != 1000 {
		t.Errorf("size and time set: %v, %v", st, err)
	}
	if got, err := os.ReadFile(files[0].Name()); err != nil || string(got) != "firsti" {
		t.Errorf("the file has %q (%v)", got, err)
	}
}

// What makes no sense is refused, each by its error, and the device goes on.
func TestRefused(t *testing.T) {
	c, files := newClient(t, "content")
	huge := c.rw(0, maxPages*4096+1)
	chmod := append(fields(uint32(setMode), uint32(0)), make([]byte, 80)...)
	for _, r := range []struct {
		what string
		op   uint32
		node uint64
		room int
		body []byte
		want unix.Errno
	}{
		{"a node that is not", opRead, 3, clientRoom, c.rw(0, 1), unix.ESTALE},
		{"node 0", opWrite, 0, clientRoom, c.rw(0, 1), unix.ESTALE},
		{"the last node", opGetattr, 1<<64 - 1, clientRoom, nil, unix.ESTALE},
		{"reading the folder", opRead, rootNode, clientRoom, c.rw(0, 1), unix.EISDIR},
		{"a name in a file", opLookup, 2, clientRoom, []byte("0\x00"), unix.ENOTDIR},
		{"a name without end", opLookup, rootNode, clientRoom, []byte("0"), unix.ENOENT},
		{"reading at a negative offset", opRead, 2, clientRoom, c.rw(-1, 1), unix.EINVAL},
		{"reading too much", opRead, 2, clientRoom, huge, unix.EINVAL},
		{"reading, half a request", opRead, 2, clientRoom, huge[:20], unix.EINVAL},
		{"writing more than comes", opWrite, 2, clientRoom, append(c.rw(0, 10), "123"...), unix.EINVAL},
		{"a hole before the beginning", opFallocate, 2, clientRoom, fields(0, -4096, 4096, uint32(3), uint32(0)), unix.EINVAL},
		{"a hole of nothing", opFallocate, 2, clientRoom, fields(0, 0, 0, uint32(3), uint32(0)), unix.EINVAL},
		{"an unknown kind of allocation", opFallocate, 2, clientRoom, fields(0, 0, 4096, uint32(1<<30), uint32(0)), unix.EOPNOTSUPP},
		{"another owner or mode", opSetattr, 2, clientRoom, chmod, unix.EPERM},
		{"a negative size", opSetattr, 2, clientRoom, append(fields(uint32(setSize), uint32(0), 0, -1), make([]byte, 64)...), unix.EINVAL},
		{"an answer without room", opGetattr, 2, outHeaderSize + 8, make([]byte, 16), unix.EIO},
		{"another version", opInit, 0, clientRoom, fields(uint32(8), uint32(0), uint32(0), uint32(0)), unix.EPROTO},
		{"making a file", 35, rootNode, clientRoom, make([]byte, 16), unix.EISDIR},
		{"an unknown operation", 4000, 2, clientRoom, nil, unix.ENOSYS},
	} {
		if errno, b := c.send(r.op, r.node, r.room, r.body); errno != r.want || len(b) != 0 {
			t.Errorf("%s: %v and %d bytes, want %v", r.what, errno, len(b), r.want)
		}
	}
	// No answer is asked for, or none fits: the chain comes back empty.
	for _, bufs := range [][]virtiotest.Buf{
		{{Addr: c.in, Len: inHeaderSize}},
		{{Addr: c.in, Len: 7}, {Addr: c.out, Len: 100, Write: true}},
		{{Addr: c.in, Len: inHeaderSize}, {Addr: c.out, Len: 15, Write: true}},
	} {
		if used := c.d.Do(0, bufs...); used != 0 {
			t.Errorf("%d bytes came", used)
		}
	}
	if got, err := os.ReadFile(files[0].Name()); err != nil || string(got) != "content" {
		t.Errorf("the file has %q (%v)", got, err)
	}
	if got := c.must(opRead, 2, c.rw(0, 100)).b; string(got) != "content" {
		t.Errorf("read %q", got)
	}
}
