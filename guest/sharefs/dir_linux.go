package sharefs

import (
	"bytes"
	"encoding/binary"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"
)

// one checks that name is one path component. The server has checked it; the
// kernel would take others in some of the calls below.
func one(name string) error {
	if name == "" || name == "." || name == ".." || bytes.ContainsAny([]byte(name), "/\x00") {
		return unix.EINVAL
	}
	return nil
}

// change is what every call that changes the folder asks first.
func (f *file) change(name string) error {
	if !f.s.writable {
		return unix.EROFS
	}
	return one(name)
}

// Create implements p9.File. The file gets the permissions asked for, whatever
// the umask of this process.
func (f *file) Create(name string, flags p9.OpenFlags, perm p9.FileMode, _ p9.UID, _ p9.GID) (p9.File, p9.QID, uint32, error) {
	fail := func(err error) (p9.File, p9.QID, uint32, error) { return nil, p9.QID{}, 0, err }
	if err := f.change(name); err != nil {
		return fail(err)
	}
	how := int(flags)&openFlags&^unix.O_DIRECTORY | safeFlags
	// Linux passes on O_CREAT and, if meant, O_EXCL. Without either it is the
	// create of the protocol, which fails when there is such a file.
	exclusive := flags&unix.O_CREAT == 0 || flags&unix.O_EXCL != 0
	mode := uint32(perm) & permissions
	for range createTries {
		fd, err := f.h.openat(name, how|unix.O_CREAT|unix.O_EXCL, mode)
		if err == nil {
			return f.created(fd, mode)
		}
		if err != unix.EEXIST || exclusive {
			return fail(err)
		}
		// It is looked at before it is opened: opening a FIFO wakes whoever
		// waits at its other end, and opening a device node is an act.
		to, st, err := f.existing(name, how)
		if err == nil {
			return to, f.s.qid(uint64(st.Dev), st.Ino, st.Mode), 0, nil
		}
		if err != unix.ENOENT { // removed meanwhile: try again
			return fail(err)
		}
	}
	return fail(unix.EAGAIN)
}

// createTries bounds how often Create runs after a name that comes and goes.
const createTries = 100

// created is the new file fd, with the permissions asked for.
func (f *file) created(fd int, mode uint32) (p9.File, p9.QID, uint32, error) {
	h := f.s.hold(fd)
	st, err := h.stat()
	if err == nil && st.Mode&permissions != mode {
		err = unix.Fchmod(fd, mode)
	}
	if err != nil {
		h.release()
		return nil, p9.QID{}, 0, err
	}
	h.acquire()
	return &file{s: f.s, h: h, io: h}, f.s.qid(uint64(st.Dev), st.Ino, st.Mode), 0, nil
}

// existing opens the regular file name.
func (f *file) existing(name string, how int) (*file, unix.Stat_t, error) {
	fd, err := f.h.openat(name, unix.O_PATH, 0)
	if err != nil {
		return nil, unix.Stat_t{}, err
	}
	to := &file{s: f.s, h: f.s.hold(fd)}
	st, err := to.h.stat()
	switch {
	case err != nil:
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		err = unix.EISDIR
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		err = unix.ELOOP
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		err = unix.ENXIO
	default:
		err = to.openIO(how)
	}
	if err != nil {
		to.Close()
		return nil, st, err
	}
	return to, st, nil
}

// made returns the QID of what has just been made under name and gives it the
// permissions asked for, if it is of that kind still.
func (f *file) made(name string, kind, perm uint32) (p9.QID, error) {
	fd, err := f.h.openat(name, unix.O_PATH, 0)
	if err != nil {
		return p9.QID{}, err
	}
	h := f.s.hold(fd)
	defer h.release()
	st, err := h.stat()
	if err != nil {
		return p9.QID{}, err
	}
	if st.Mode&unix.S_IFMT == kind && kind != unix.S_IFLNK && st.Mode&permissions != perm {
		if err := h.chmod(kind, perm); err != nil {
			return p9.QID{}, err
		}
	}
	return f.s.qid(uint64(st.Dev), st.Ino, st.Mode), nil
}

// Mkdir implements p9.File.
func (f *file) Mkdir(name string, perm p9.FileMode, _ p9.UID, _ p9.GID) (p9.QID, error) {
	if err := f.change(name); err != nil {
		return p9.QID{}, err
	}
	mode := uint32(perm) & permissions
	if err := unix.Mkdirat(f.h.fd, name, mode); err != nil {
		return p9.QID{}, err
	}
	return f.made(name, unix.S_IFDIR, mode)
}

// Symlink implements p9.File. The target is only text to the host.
func (f *file) Symlink(target, name string, _ p9.UID, _ p9.GID) (p9.QID, error) {
	if err := f.change(name); err != nil {
		return p9.QID{}, err
	}
	if err := unix.Symlinkat(target, f.h.fd, name); err != nil {
		return p9.QID{}, err
	}
	return f.made(name, unix.S_IFLNK, 0)
}

// Mknod implements p9.File. FIFOs and sockets are names for the guest's own.
func (f *file) Mknod(name string, m p9.FileMode, _, _ uint32, _ p9.UID, _ p9.GID) (p9.QID, error) {
	if err := f.change(name); err != nil {
		return p9.QID{}, err
	}
	kind, mode := uint32(m)&unix.S_IFMT, uint32(m)&permissions
	switch kind {
	case unix.S_IFREG, unix.S_IFIFO, unix.S_IFSOCK:
	default:
		return p9.QID{}, unix.EPERM
	}
	if err := unix.Mknodat(f.h.fd, name, kind|mode, 0); err != nil {
		return p9.QID{}, err
	}
	return f.made(name, kind, mode)
}

// Link implements p9.File.
func (f *file) Link(target p9.File, name string) error {
	if err := f.change(name); err != nil {
		return err
	}
	t, ok := target.(*file)
	if !ok || t.s != f.s {
		return unix.EXDEV
	}
	return unix.Linkat(unix.AT_FDCWD, t.h.proc(), f.h.fd, name, unix.AT_SYMLINK_FOLLOW)
}

// RenameAt implements p9.File.
func (f *file) RenameAt(oldName string, newDir p9.File, newName string) error {
	if err := f.change(oldName); err != nil {
		return err
	}
	if err := one(newName); err != nil {
		return err
	}
	to, ok := newDir.(*file)
	if !ok || to.s != f.s {
		return unix.EXDEV
	}
	return unix.Renameat(f.h.fd, oldName, to.h.fd, newName)
}

// UnlinkAt implements p9.File.
func (f *file) UnlinkAt(name string, flags uint32) error {
	if err := f.change(name); err != nil {
		return err
	}
	return unix.Unlinkat(f.h.fd, name, int(flags)&unix.AT_REMOVEDIR)
}

// dirStream is where a folder is being read. It holds one buffer of entries,
// however many there are.
type dirStream struct {
	buf  []byte
	left []byte // entries not given out yet
	next uint64 // the cookie of the last one that was
}

const direntHeader = 19 // d_ino[8] d_off[8] d_reclen[2] d_type[1] of getdents64(2)

// Readdir implements p9.File. Offsets are the file system's own cookies.
func (f *file) Readdir(off uint64, count uint32) (p9.Dirents, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.io == nil {
		return nil, unix.EBADF
	}
	d := &f.dir
	if d.buf == nil {
		d.buf = make([]byte, 64<<10)
	}
	if off == 0 || off != d.next {
		if _, err := unix.Seek(f.io.fd, int64(off), 0); err != nil {
			return nil, err
		}
		d.left, d.next = nil, off
	}
	var entries p9.Dirents
	for room := int(count); ; {
		if len(d.left) == 0 {
			n, err := retry(func() (int, error) { return unix.Getdents(f.io.fd, d.buf) })
			if err != nil && entries == nil {
				return nil, err
			}
			if err != nil || n == 0 {
				return entries, nil
			}
			d.left = d.buf[:n]
		}
		e := d.left
		size := int(binary.NativeEndian.Uint16(e[16:]))
		if size < direntHeader || size > len(e) {
			return nil, unix.EIO
		}
		ino, cookie, typ := binary.NativeEndian.Uint64(e), binary.NativeEndian.Uint64(e[8:]), e[18]
		name, _, _ := bytes.Cut(e[direntHeader:size], []byte{0})
		if s := string(name); s != "." && s != ".." {
			if room -= 13 + 8 + 1 + 2 + len(s); room < 0 && entries != nil {
				return entries, nil
			}
			entries = append(entries, f.dirent(s, ino, cookie, typ))
		}
		d.left, d.next = e[size:], cookie
	}
}

// dirent makes an entry. Its type is d_type, as 9P2000.L means it (the p9
// library's documentation suggests a QID type).
func (f *file) dirent(name string, ino, cookie uint64, typ uint8) p9.Dirent {
	dev := f.s.dev
	mode := uint32(typ) << 12
	if typ == unix.DT_UNKNOWN || typ == unix.DT_DIR {
		// A folder may be a mount point, whose inode is another.
		if fd, err := f.h.openat(name, unix.O_PATH, 0); err == nil {
			h := f.s.hold(fd)
			if st, err := h.stat(); err == nil {
				dev, ino, mode = uint64(st.Dev), st.Ino, st.Mode
			}
			h.release()
		}
	}
	return p9.Dirent{QID: f.s.qid(dev, ino, mode), Offset: cookie, Type: p9.QIDType(mode & unix.S_IFMT >> 12), Name: name}
}
