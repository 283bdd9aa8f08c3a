package sharefs

import (
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"
)

// Share is a shared folder: a p9.Attacher for any number of sessions. The
// folder is the one there was when New was called, even if it is renamed.
type Share struct {
	writable bool
	uid      uint32 // whom the guest sees as root
	dev      uint64 // of the folder
	max      int64
	open     atomic.Int64 // descriptors in use
	root     *handle
	close    sync.Once
}

// New shares the folder dir. The caller must Close the share after the last
// session has ended. Errors: what open(2) says, ErrNotDirectory.
func New(dir string, o Options) (*Share, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == unix.ENOTDIR {
		return nil, fmt.Errorf("%w: %s; name a folder to share", ErrNotDirectory, dir)
	}
	if err != nil {
		return nil, &os.PathError{Op: "share", Path: dir, Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "share", Path: dir, Err: err}
	}
	s := &Share{writable: o.Writable, uid: uint32(os.Geteuid()), dev: uint64(st.Dev), max: int64(o.MaxFiles)}
	if s.max <= 0 {
		s.max = int64(FilesEach(1))
	}
	s.root = s.hold(fd)
	return s, nil
}

// FilesEach is what MaxFiles should be for each of that many shares of one
// process: they divide three quarters of what it may open (RLIMIT_NOFILE). The
// rest is its own, for disks, eventfds and whatever it has to open later.
func FilesEach(shares int) int {
	limit := 1024
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err == nil {
		limit = int(min(lim.Cur, 1<<20))
	}
	return max((limit-limit/4)/max(shares, 1), 1)
}

// Attach implements p9.Attacher.
func (s *Share) Attach() (p9.File, error) {
	if !s.root.acquire() {
		return nil, os.ErrClosed
	}
	return &file{s: s, h: s.root}, nil
}

// Close releases the folder; files that are still open stay so until they are
// closed. It is idempotent.
func (s *Share) Close() error {
	s.close.Do(s.root.release)
	return nil
}

// handle is a descriptor that any number of files refer to.
type handle struct {
	s    *Share
	fd   int
	refs atomic.Int64
}

// hold makes a handle with one reference. It takes fd over.
func (s *Share) hold(fd int) *handle {
	s.open.Add(1)
	h := &handle{s: s, fd: fd}
	h.refs.Store(1)
	return h
}

func (h *handle) acquire() bool {
	for {
		n := h.refs.Load()
		if n <= 0 {
			return false
		}
		if h.refs.CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (h *handle) release() {
	if h.refs.Add(-1) == 0 {
		unix.Close(h.fd)
		h.s.open.Add(-1)
	}
}

// proc is a path that leads to the very file h holds, not to one of its name.
// It must not be used on a symbolic link, except by linkat(2).
func (h *handle) proc() string { return "/proc/self/fd/" + strconv.Itoa(h.fd) }

// openat opens name, one path component, in the folder h.
func (h *handle) openat(name string, flags int, mode uint32) (int, error) {
	if h.s.open.Load() >= h.s.max {
		return -1, unix.EMFILE
	}
	return retry(func() (int, error) {
		return unix.Openat2(h.fd, name, &unix.OpenHow{
			Flags:   uint64(flags | unix.O_NOFOLLOW | unix.O_CLOEXEC),
			Mode:    uint64(mode),
			Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
		})
	})
}

// retry repeats a call that a signal or a rename elsewhere interrupted.
func retry[T any](f func() (T, error)) (T, error) {
	for n := 0; ; n++ {
		v, err := f()
		if err == unix.EINTR || err == unix.EAGAIN && n < 100 {
			continue
		}
		return v, err
	}
}
