package cowdisk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// HostFS is the FS of the machine: plain files and block devices, locked with whole-file open-file-description locks (F_OFD_SETLK). These
// conflict with the POSIX locks that User Mode Linux takes and with a second open in the same process.
type HostFS struct {
	// opened, if not nil, runs between the open of a file and its lock: where tests let other tools come in between.
	opened func(path string)
	// named makes Create do as on file systems without nameless files.
	named bool
}

// hostFile does its I/O on the bare descriptor: it is opened, used and closed by one Disk, which does not close it while it is in use.
type hostFile struct {
	fd     int
	path   string
	device bool
	locked bool
	closed atomic.Bool
}

// Open opens path, takes the lock and makes sure that path still names the file that was locked.
func (h HostFS) Open(path string, m OpenMode) (File, error) {
	return h.lockNamed(path, m,
		func() (int, error) { return open(unix.AT_FDCWD, path, openFlags(m), 0) },
		path, unix.Stat)
}

// OpenBeneath opens root/rel; [os.Root] keeps symlinks from leading out of root. The name is checked after the lock as Open does.
func (h HostFS) OpenBeneath(root, rel string, m OpenMode) (File, error) {
	path := filepath.Join(root, rel)
	r, err := os.OpenRoot(root)
	if err != nil {
		return nil, openError(path, m, err)
	}
	defer r.Close()
	return h.lockNamed(path, m,
		func() (int, error) {
			f, err := r.OpenFile(rel, openFlags(m), 0)
			if err != nil {
				return -1, err
			}
			defer f.Close()
			// A second descriptor of the same open file description: the lock belongs to the description, and lasts until both are closed.
			return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		},
		rel, func(rel string, st *unix.Stat_t) error {
			fi, err := r.Stat(rel)
			if err != nil {
				return err
			}
			sys, ok := fi.Sys().(*syscall.Stat_t)
			if !ok {
				return errors.ErrUnsupported
			}
			st.Dev, st.Ino = sys.Dev, sys.Ino
			return nil
		})
}

// LookBeneath looks as OpenBeneath opens.
func (h HostFS) LookBeneath(root, rel string) (target string, dir bool, err error) {
	r, err := os.OpenRoot(root)
	if err != nil {
		return "", false, err
	}
	defer r.Close()
	st, err := r.Lstat(rel)
	if err != nil || st.Mode().Type() != fs.ModeSymlink {
		return "", err == nil && st.IsDir(), err
	}
	target, err = r.Readlink(rel)
	return target, false, err
}

// lockNamed opens and locks a file, and looks again. A tool that replaces an image by rename holds the lock of the old file until it is
// done, and that of the new one from before it has a name. Whoever waited for the old file must not use it now that it has no name.
func (h HostFS) lockNamed(path string, m OpenMode, open func() (int, error), name string, stat func(path string, st *unix.Stat_t) error) (File, error) {
	for range 10 {
		fd, err := open()
		if err != nil {
			return nil, openError(path, m, err)
		}
		if h.opened != nil {
			h.opened(path)
		}
		f, err := newHostFile(fd, path, m)
		if err != nil {
			return nil, err
		}
		if m.NoLock || f.is(name, stat) {
			return f, nil
		}
		f.Close()
	}
	return nil, &Error{Path: path, Kind: ErrLocked, Detail: "it is being replaced over and over", Remedy: "try again"}
}

// is reports whether path, looked at by stat, is f.
func (f *hostFile) is(path string, stat func(path string, st *unix.Stat_t) error) bool {
	var a, b unix.Stat_t
	return unix.Fstat(f.fd, &a) == nil && stat(path, &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino
}

// Resolve says where the kernel gets to with path: a ".." behind a symlink is the parent of what the link leads to, and a relative path
// starts at the working folder itself, whatever $PWD calls it. The last element need not exist; symlinks that dangle, one behind the other,
// are followed to the name that is missing.
func (HostFS) Resolve(path string) (string, error) {
	p := path
	if path == "" {
		return "", &fs.PathError{Op: "open", Path: path, Err: unix.ENOENT}
	}
	if !filepath.IsAbs(p) {
		wd, err := unix.Getwd()
		if err != nil {
			return "", fmt.Errorf("%s: the working folder: %w", path, err)
		}
		p = wd + "/" + p
	}
	for range maxLinks {
		r, err := filepath.EvalSymlinks(p)
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return r, err
		}
		i := strings.LastIndexByte(p, '/')
		dir, base := p[:i+1], p[i+1:]
		if base == "" || base == "." || base == ".." {
			return "", err // a folder that is not there
		}
		if dir, err = filepath.EvalSymlinks(dir); err != nil {
			return "", fmt.Errorf("%s: its folder: %w", path, err)
		}
		p = filepath.Join(dir, base)
		target, err := os.Readlink(p)
		if err != nil {
			return p, nil
		}
		p = follow(p, target)
	}
	return "", &fs.PathError{Op: "open", Path: path, Err: unix.ELOOP}
}

func openFlags(m OpenMode) int {
	flags := unix.O_NONBLOCK | unix.O_NOCTTY // a FIFO must not hang us; regular files and disks ignore it
	if m.Write {
		return flags | unix.O_RDWR
	}
	return flags | unix.O_RDONLY
}

func open(dir int, path string, flags int, perm uint32) (int, error) {
	for {
		fd, err := unix.Openat(dir, path, flags|unix.O_CLOEXEC|unix.O_LARGEFILE, perm)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

func openError(path string, m OpenMode, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	switch {
	case errors.Is(err, unix.EISDIR):
		return &Error{Path: path, Kind: ErrIsDirectory, Remedy: "name an image file"}
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES) && m.Write, errors.Is(err, unix.EPERM) && m.Write:
		return &Error{Path: path, Kind: ErrReadOnly, Err: err, Remedy: "move it to where you may write, or open it read-only"}
	}
	return &fs.PathError{Op: "open", Path: path, Err: err}
}

func newHostFile(fd int, path string, m OpenMode) (*hostFile, error) {
	f := &hostFile{fd: fd, path: path}
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err != nil {
		err = &fs.PathError{Op: "stat", Path: path, Err: err}
	} else {
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
		case unix.S_IFBLK:
			f.device = true
		case unix.S_IFDIR:
			err = &Error{Path: path, Kind: ErrIsDirectory, Remedy: "name an image file"}
		default:
			err = &Error{Path: path, Kind: ErrNotCOW, Detail: "neither a file nor a block device", Remedy: "name an image file"}
		}
	}
	if err == nil && !m.NoLock {
		err = f.lock(m.Write)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (f *hostFile) lock(exclusive bool) error {
	l := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart}
	how := unix.LOCK_SH
	if exclusive {
		l.Type, how = unix.F_WRLCK, unix.LOCK_EX
	}
	err := unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_SETLK, &l)
	if err == unix.EINVAL || err == unix.ENOLCK || errors.Is(err, errors.ErrUnsupported) {
		err = unix.Flock(f.fd, how|unix.LOCK_NB) // file systems that know only this one
	}
	switch {
	case err == nil:
		f.locked = true
		return nil
	case err == unix.EAGAIN || err == unix.EACCES:
		what := "another program is writing to it"
		if exclusive {
			what = "another program has it open"
		}
		return &Error{Path: f.path, Kind: ErrLocked, Detail: what, Remedy: "stop that program first, or make an overlay of your own"}
	}
	return &Error{Path: f.path, Kind: ErrLocked, Detail: "its file system cannot lock files", Err: err, Remedy: "move it to a local file system, or open it without a lock"}
}

// shareLock makes an exclusive lock one against writers. It cannot fail where the first could be had.
func (f *hostFile) shareLock() {
	if f.locked {
		_ = f.lock(false)
	}
}

func (f *hostFile) error(op string, err error) error {
	return &fs.PathError{Op: op, Path: f.path, Err: err}
}

func (f *hostFile) ReadAt(p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pread(f.fd, p, off)
		if err == nil {
			if n == 0 && len(p) > 0 {
				return 0, io.EOF
			}
			return n, nil
		}
		if err != unix.EINTR {
			return max(n, 0), f.error("read", err)
		}
	}
}

func (f *hostFile) WriteAt(p []byte, off int64) (int, error) {
	for {
		n, err := unix.Pwrite(f.fd, p, off)
		if err == nil {
			return n, nil
		}
		if err != unix.EINTR {
			return max(n, 0), f.error("write", err)
		}
	}
}

func (f *hostFile) ReadvAt(bufs [][]byte, off int64) (int, error) {
	for {
		n, err := preadv(f.fd, bufs, off)
		if err == nil {
			return n, nil
		}
		if err != unix.EINTR {
			return max(n, 0), f.error("read", err)
		}
	}
}

func (f *hostFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	for {
		n, err := pwritev(f.fd, bufs, off)
		if err == nil {
			return n, nil
		}
		if err != unix.EINTR {
			return max(n, 0), f.error("write", err)
		}
	}
}

func (f *hostFile) Sync() error    { return f.sync("fdatasync", unix.Fdatasync) }
func (f *hostFile) SyncAll() error { return f.sync("fsync", unix.Fsync) }

func (f *hostFile) sync(op string, call func(fd int) error) error {
	for {
		switch err := call(f.fd); err {
		case nil:
			return nil
		case unix.EINTR:
		default:
			return f.error(op, err)
		}
	}
}

func (f *hostFile) Truncate(size int64) error {
	if err := unix.Ftruncate(f.fd, size); err != nil {
		return f.error("truncate", err)
	}
	return nil
}

func (f *hostFile) PunchHole(off, n int64) error {
	return f.fallocate("punch hole", unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f *hostFile) ZeroRange(off, n int64) error {
	return f.fallocate("zero range", unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (f *hostFile) fallocate(op string, mode uint32, off, n int64) error {
	for {
		err := unix.Fallocate(f.fd, mode, off, n)
		switch {
		case err == nil:
			return nil
		case err == unix.EINTR:
		case err == unix.EINVAL && f.device, err == unix.EPERM: // a range that is not aligned to the device's blocks; a swap or sealed file
			return f.error(op, errors.ErrUnsupported)
		default:
			return f.error(op, err) // EOPNOTSUPP and ENOSYS are errors.ErrUnsupported
		}
	}
}

func (f *hostFile) NextData(off int64) (int64, int64, error) {
	if !f.device {
		// SEEK_DATA moves the descriptor's position, which nobody uses.
		start, err := unix.Seek(f.fd, off, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return 0, 0, io.EOF
		}
		if err == nil {
			end, err := unix.Seek(f.fd, start, unix.SEEK_HOLE)
			if err == nil && end > start {
				return start, end, nil
			}
		}
	}
	st, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	if off >= st.Size {
		return 0, 0, io.EOF
	}
	return off, st.Size, nil
}

func (f *hostFile) Stat() (FileInfo, error) {
	var st unix.Stat_t
	if err := unix.Fstat(f.fd, &st); err != nil {
		return FileInfo{}, f.error("stat", err)
	}
	i := FileInfo{Size: st.Size, Allocated: st.Blocks * 512, Device: f.device, ID: FileID{uint64(st.Dev), st.Ino}, Nameless: st.Nlink == 0}
	if f.device {
		size, err := unix.Seek(f.fd, 0, io.SeekEnd)
		if err != nil {
			return i, f.error("seek", err)
		}
		i.Size, i.Allocated = size, size
		i.ID = FileID{^uint64(0), uint64(st.Rdev)}
	} else {
		i.ModTime = time.Unix(st.Mtim.Unix())
	}
	return i, nil
}

// Touch sets both times: who may write the file may do that, also when it is not his.
func (f *hostFile) Touch() error {
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.fd), nil, 0); err != nil {
		return f.error("set time", err)
	}
	return nil
}

func (f *hostFile) Close() error {
	if f.closed.Swap(true) {
		return nil
	}
	if f.locked {
		// Closing alone would leave the lock with a child that was forked a moment ago and has not yet come to its exec.
		l := unix.Flock_t{Type: unix.F_UNLCK, Whence: io.SeekStart}
		if unix.FcntlFlock(uintptr(f.fd), unix.F_OFD_SETLK, &l) != nil {
			unix.Flock(f.fd, unix.LOCK_UN)
		}
	}
	if err := unix.Close(f.fd); err != nil && err != unix.EINTR {
		return f.error("close", err)
	}
	return nil
}

// tempSuffix ends the names of files under construction.
const tempSuffix = ".moovm-new"

// newFile is a file that has no name yet (O_TMPFILE), or where the file system cannot do that, a temporary one.
type newFile struct {
	*hostFile
	target string
	temp   string // "" = the file has no name
}

// Create prepares a file for path. Nothing is left behind when the process dies, except on file systems without O_TMPFILE, where the next
// Create of the same path takes the leftover over.
func (h HostFS) Create(path string) (NewFile, error) {
	dir := filepath.Dir(path)
	w := OpenMode{Write: true}
	fd, err := -1, error(unix.EOPNOTSUPP)
	if !h.named && unix.Access("/proc/self/fd", unix.X_OK) == nil { // which is what gives a nameless file its name later
		fd, err = open(unix.AT_FDCWD, dir, unix.O_TMPFILE|unix.O_RDWR, 0o666)
	}
	if err == nil {
		f, err := newHostFile(fd, path, w)
		if err != nil {
			return nil, err
		}
		return &newFile{hostFile: f, target: path}, nil
	}
	if !errors.Is(err, errors.ErrUnsupported) && err != unix.EISDIR && err != unix.EINVAL {
		return nil, openError(path, w, err)
	}
	return createNamed(path)
}

// createNamed makes the file under a temporary name, which others can guess: so nobody but the owner may open it until it is published,
// and what lies there before is not used.
func createNamed(path string) (NewFile, error) {
	temp, w := path+tempSuffix, OpenMode{Write: true}
	for range 10 {
		fd, err := open(unix.AT_FDCWD, temp, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o600)
		if err == unix.EEXIST {
			if err := removeLeftover(temp); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, openError(path, w, err)
		}
		f, err := newHostFile(fd, temp, w)
		if err != nil {
			return nil, err
		}
		if f.is(temp, unix.Lstat) { // else somebody took it for a leftover before it was locked
			return &newFile{hostFile: f, target: path, temp: temp}, nil
		}
		f.Close()
	}
	return nil, &Error{Path: path, Kind: ErrLocked, Detail: "others make it over and over", Remedy: "try again"}
}

// removeLeftover removes the file of a process that died while it made the same image. One that is still at it holds the lock.
func removeLeftover(temp string) error {
	w := OpenMode{Write: true}
	fd, err := open(unix.AT_FDCWD, temp, openFlags(w)|unix.O_NOFOLLOW, 0)
	if err == unix.ENOENT {
		return nil
	}
	if err != nil {
		return openError(temp, w, err)
	}
	f, err := newHostFile(fd, temp, w)
	if err != nil {
		return err
	}
	defer f.Close()
	if !f.is(temp, unix.Lstat) {
		return nil
	}
	if err := unix.Unlink(temp); err != nil {
		return &fs.PathError{Op: "remove", Path: temp, Err: err}
	}
	return nil
}

// umask is the process's; a process that cannot see it makes files for its user alone.
func umask() uint32 {
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Umask:"); ok {
			if n, err := strconv.ParseUint(strings.TrimSpace(v), 8, 12); err == nil {
				return uint32(n)
			}
		}
	}
	return 0o077
}

func (f *newFile) Publish(replace, durable bool) error {
	if durable {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	var err error
	if replace {
		err = f.replace()
	} else {
		err = f.name()
	}
	if err != nil {
		return err
	}
	f.temp, f.path = "", f.target
	if durable {
		return syncDir(filepath.Dir(f.target))
	}
	return nil
}

// link gives a nameless file a name.
func (f *newFile) link(name string) error {
	return unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", f.fd), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW)
}

// name gives the file its name unless somebody else has it.
func (f *newFile) name() error {
	var err error
	if f.temp == "" {
		err = f.link(f.target)
	} else if err = unix.Fchmod(f.fd, 0o666&^umask()); err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, f.temp, unix.AT_FDCWD, f.target, unix.RENAME_NOREPLACE)
		if err == unix.EINVAL || errors.Is(err, errors.ErrUnsupported) {
			if err = unix.Link(f.temp, f.target); err == nil {
				err = unix.Unlink(f.temp)
			}
		}
	}
	if err == unix.EEXIST {
		return &Error{Path: f.target, Kind: ErrExists, Remedy: "remove it first, or choose another name"}
	}
	if err != nil {
		return &fs.PathError{Op: "create", Path: f.target, Err: err}
	}
	return nil
}

// replace puts the file in the place of the one that has its name.
func (f *newFile) replace() error {
	var old unix.Stat_t
	if err := unix.Stat(f.target, &old); err == nil {
		unix.Fchown(f.fd, int(old.Uid), int(old.Gid)) // as far as we may
		if err := unix.Fchmod(f.fd, old.Mode&0o7777); err != nil {
			return f.error("chmod", err)
		}
	} else if f.temp != "" {
		if err := unix.Fchmod(f.fd, 0o666&^umask()); err != nil {
			return f.error("chmod", err)
		}
	}
	if f.temp == "" {
		temp := f.target + tempSuffix
		unix.Unlink(temp) // a leftover: whoever replaces an image holds the image's lock, so nobody else is at it
		if err := f.link(temp); err != nil {
			return &fs.PathError{Op: "create", Path: f.target, Err: err}
		}
		f.temp = temp
	}
	if err := unix.Rename(f.temp, f.target); err != nil {
		return &fs.PathError{Op: "rename", Path: f.target, Err: err}
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, errors.ErrUnsupported) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// Close of an unpublished file removes it.
func (f *newFile) Close() error {
	if f.temp != "" {
		unix.Unlink(f.temp)
		f.temp = ""
	}
	return f.hostFile.Close()
}
