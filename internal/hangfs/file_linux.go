package hangfs

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// File is the file. It goes with its test.
type File struct {
	Path string

	dev  int // /dev/fuse
	wake int // an eventfd: hang
	done chan struct{}
	once sync.Once
	data []byte
}

// New makes a file with size bytes of zeros, or skips the test where it cannot.
func New(t testing.TB, size int) *File {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("hangfs: mounting a FUSE file system needs root; run the test as root")
	}
	dev, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("hangfs: /dev/fuse: %v; load the kernel's module fuse", err)
	}
	f := &File{Path: filepath.Join(t.TempDir(), "hang.img"), dev: dev, done: make(chan struct{}), data: make([]byte, size)}
	t.Cleanup(func() { unix.Close(dev) }) // whoever waits gets an error
	if f.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(f.wake) })
	if err := os.WriteFile(f.Path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	options := "fd=" + strconv.Itoa(dev) + ",rootmode=100600,user_id=0,group_id=0,allow_other"
	if err := unix.Mount("hangfs", f.Path, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		t.Skipf("hangfs: mount: %v; a container that may mount is needed", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(f.Path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	go f.serve()
	t.Cleanup(f.Hang)
	// The kernel hears once that close needs no answer: it would wait for one
	// even in a process that was killed. Another process opens the file for that:
	// a child that another test starts now would inherit it, and wait for an
	// answer before it runs its program, for which the runtime waits.
	if out, err := exec.Command("sh", "-c", `: <"$1"`, "sh", f.Path).CombinedOutput(); err != nil {
		t.Fatalf("hangfs: %v: %s", err, out)
	}
	// The same with poll: the runtime's poller asks for it, on os.Open, while it
	// holds a processor that serve may need.
	p, err := unix.Open(f.Path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = unix.Poll([]unix.PollFd{{Fd: int32(p), Events: unix.POLLIN}}, 0)
	unix.Close(p)
	return f
}

// Hang ends all answers. What waits for one can be killed: the requests stay
// unread, which to the kernel is not yet under way.
func (f *File) Hang() {
	f.once.Do(func() { _, _ = unix.Write(f.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0}) })
	<-f.done
}

// Waited returns when somebody waits for an answer that will not come.
func (f *File) Waited(t testing.TB) {
	t.Helper()
	f.Hang()
	fds := []unix.PollFd{{Fd: int32(f.dev), Events: unix.POLLIN}}
	for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); {
		if n, _ := unix.Poll(fds, 1000); n > 0 {
			return
		}
	}
	t.Fatal("hangfs: nobody uses the file")
}

// Operations and flags of include/uapi/linux/fuse.h.
const (
	opForget, opGetattr, opSetattr, opOpen, opRead, opWrite = 2, 3, 4, 14, 15, 16
	opStatfs, opRelease, opFsync, opInit, opInterrupt       = 17, 18, 20, 26, 36
	opBatchForget, opFallocate                              = 42, 43

	headerSize = 40
	directIO   = 1 << 0
	setSize    = 1 << 3
	maxWrite   = 128 << 10
)

func (f *File) serve() {
	defer close(f.done)
	in := make([]byte, maxWrite+8192)
	for {
		fds := []unix.PollFd{{Fd: int32(f.wake), Events: unix.POLLIN}, {Fd: int32(f.dev), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil && err != unix.EINTR {
			return
		}
		if fds[0].Revents != 0 {
			return
		}
		n, err := unix.Read(f.dev, in)
		switch {
		case err == unix.EAGAIN, err == unix.EINTR, err == unix.ENOENT:
			continue
		case err != nil || n < headerSize:
			return // unmounted
		}
		op := binary.LittleEndian.Uint32(in[4:])
		if op == opForget || op == opBatchForget || op == opInterrupt {
			continue
		}
		body, errno := f.do(op, in[headerSize:n])
		out := binary.LittleEndian.AppendUint32(nil, uint32(16+len(body)))
		out = binary.LittleEndian.AppendUint32(out, uint32(-int32(errno)))
		out = append(append(out, in[8:16]...), body...)
		_, _ = unix.Write(f.dev, out) // who asked may be gone
	}
}

func (f *File) do(op uint32, arg []byte) (body []byte, errno unix.Errno) {
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(arg[at:]) }
	u64 := func(at int) uint64 { return binary.LittleEndian.Uint64(arg[at:]) }
	switch op {
	case opInit:
		body = make([]byte, 64)
		for at, v := range map[int]uint32{0: 7, 4: 31, 20: maxWrite, 24: 1} {
			binary.LittleEndian.PutUint32(body[at:], v)
		}
		return body, 0
	case opSetattr:
		if u32(0)&setSize != 0 {
			f.data = append(f.data, make([]byte, max(0, int(u64(16))-len(f.data)))...)[:u64(16)]
		}
		return f.attributes(), 0
	case opGetattr:
		return f.attributes(), 0
	case opOpen:
		body = make([]byte, 16)
		binary.LittleEndian.PutUint32(body[8:], directIO)
		return body, 0
	case opRead:
		off := min(u64(8), uint64(len(f.data)))
		return f.data[off:min(off+uint64(u32(16)), uint64(len(f.data)))], 0
	case opWrite:
		off, n := u64(8), uint64(u32(16))
		if off+n > uint64(len(f.data)) {
			return nil, unix.ENOSPC
		}
		copy(f.data[off:], arg[40:][:n])
		return binary.LittleEndian.AppendUint64(nil, n), 0
	case opFallocate:
		off := min(u64(8), uint64(len(f.data)))
		clear(f.data[off:min(off+u64(16), uint64(len(f.data)))])
		return nil, 0
	case opStatfs:
		return make([]byte, 80), 0
	case opRelease, opFsync:
		return nil, 0
	}
	return nil, unix.ENOSYS
}

// attributes is a struct fuse_attr_out.
func (f *File) attributes() []byte {
	b := make([]byte, 104)
	binary.LittleEndian.PutUint64(b[16:], 1) // the inode
	binary.LittleEndian.PutUint64(b[24:], uint64(len(f.data)))
	binary.LittleEndian.PutUint64(b[32:], uint64(len(f.data)/512))
	binary.LittleEndian.PutUint32(b[76:], unix.S_IFREG|0o600)
	binary.LittleEndian.PutUint32(b[80:], 1)
	binary.LittleEndian.PutUint32(b[96:], 4096)
	return b
}
