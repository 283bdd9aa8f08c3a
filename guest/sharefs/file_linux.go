package sharefs

import (
	"encoding/binary"
	"hash/fnv"
	"io"
	"math"
	"sync"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"
)

const (
	// permissions are the mode bits that are shown and can be set.
	permissions = 0o1777
	// openFlags are the flags of open(2) that a guest may pass on.
	openFlags = unix.O_ACCMODE | unix.O_APPEND | unix.O_TRUNC | unix.O_SYNC | unix.O_DIRECTORY
	// blockSize is what st_blksize says. Tools read that much at a time, so
	// a round trip should be worth it.
	blockSize = 128 << 10
	// safeFlags keep an open from waiting for, or becoming the terminal of, anything.
	safeFlags = unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
)

// file is a client's reference to a file of the share.
type file struct {
	s *Share
	h *handle // the file; O_PATH unless it was created through this reference

	mu  sync.Mutex
	io  *handle // the file, opened; nil before
	dir dirStream

	resident int // how to read what is in memory
}

// Ways to read what is in memory.
const (
	residentNoWait = iota // the kernel says whether it is
	residentAlways
	residentNever // the file system cannot say
)

var _ p9.File = (*file)(nil)

// stat returns the attributes of what h holds.
func (h *handle) stat() (st unix.Stat_t, err error) {
	_, err = retry(func() (int, error) { return 0, unix.Fstat(h.fd, &st) })
	return st, err
}

// qid is unique for a file of the share, across the file systems mounted in it.
func (s *Share) qid(dev, ino uint64, mode uint32) p9.QID {
	q := p9.QID{Type: p9.FileMode(mode).QIDType(), Path: ino}
	if dev != s.dev {
		h := fnv.New64a()
		binary.Write(h, binary.LittleEndian, [2]uint64{dev, ino})
		q.Path = h.Sum64()
	}
	return q
}

func (s *Share) attr(st *unix.Stat_t) (p9.QID, p9.Attr) {
	mode := st.Mode & (unix.S_IFMT | permissions)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		mode = st.Mode & unix.S_IFMT // the guest's device of that number is not meant
	}
	uid, gid := st.Uid, st.Gid
	if uid == s.uid {
		uid, gid = 0, 0
	}
	return s.qid(uint64(st.Dev), st.Ino, st.Mode), p9.Attr{
		Mode: p9.FileMode(mode), UID: p9.UID(uid), GID: p9.GID(gid), NLink: p9.NLink(st.Nlink),
		Size: uint64(st.Size), BlockSize: blockSize, Blocks: uint64(st.Blocks),
		ATimeSeconds: uint64(st.Atim.Sec), ATimeNanoSeconds: uint64(st.Atim.Nsec),
		MTimeSeconds: uint64(st.Mtim.Sec), MTimeNanoSeconds: uint64(st.Mtim.Nsec),
		CTimeSeconds: uint64(st.Ctim.Sec), CTimeNanoSeconds: uint64(st.Ctim.Nsec),
	}
}

var basic = p9.AttrMask{Mode: true, NLink: true, UID: true, GID: true, RDev: true, ATime: true, MTime: true, CTime: true, INo: true, Size: true, Blocks: true}

// Walk implements p9.File.
func (f *file) Walk(names []string) ([]p9.QID, p9.File, error) {
	qids, to, _, err := f.walk(names)
	if err != nil {
		return nil, nil, err
	}
	return qids, to, nil
}

// WalkGetAttr implements p9.File.
func (f *file) WalkGetAttr(names []string) ([]p9.QID, p9.File, p9.AttrMask, p9.Attr, error) {
	qids, to, st, err := f.walk(names)
	if err != nil {
		return nil, nil, p9.AttrMask{}, p9.Attr{}, err
	}
	_, attr := f.s.attr(&st)
	return qids, to, basic, attr, nil
}

func (f *file) walk(names []string) (qids []p9.QID, to *file, st unix.Stat_t, err error) {
	h := f.h
	if !h.acquire() {
		return nil, nil, st, unix.EBADF
	}
	if len(names) == 0 {
		if st, err = h.stat(); err != nil {
			h.release()
			return nil, nil, st, err
		}
	}
	for _, name := range names {
		fd, err := h.openat(name, unix.O_PATH, 0)
		h.release()
		if err != nil {
			return nil, nil, st, err
		}
		h = f.s.hold(fd)
		if st, err = h.stat(); err != nil {
			h.release()
			return nil, nil, st, err
		}
		qids = append(qids, f.s.qid(uint64(st.Dev), st.Ino, st.Mode))
	}
	return qids, &file{s: f.s, h: h}, st, nil
}

// GetAttr implements p9.File.
func (f *file) GetAttr(p9.AttrMask) (p9.QID, p9.AttrMask, p9.Attr, error) {
	st, err := f.h.stat()
	if err != nil {
		return p9.QID{}, p9.AttrMask{}, p9.Attr{}, err
	}
	qid, attr := f.s.attr(&st)
	return qid, basic, attr, nil
}

// StatFS implements p9.File.
func (f *file) StatFS() (p9.FSStat, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(f.h.fd, &st); err != nil {
		return p9.FSStat{}, err
	}
	return p9.FSStat{
		Type: 0x01021997, BlockSize: uint32(st.Bsize), Blocks: st.Blocks, BlocksFree: st.Bfree, BlocksAvailable: st.Bavail,
		Files: st.Files, FilesFree: st.Ffree, NameLength: uint32(st.Namelen),
	}, nil
}

// Open implements p9.File.
func (f *file) Open(flags p9.OpenFlags) (p9.QID, uint32, error) {
	how := int(flags) & openFlags
	if !f.s.writable && (how&unix.O_ACCMODE != unix.O_RDONLY || how&unix.O_TRUNC != 0) {
		return p9.QID{}, 0, unix.EROFS
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.io != nil {
		return p9.QID{}, 0, unix.EINVAL
	}
	st, err := f.h.stat()
	if err != nil {
		return p9.QID{}, 0, err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFDIR:
	default:
		return p9.QID{}, 0, unix.ENXIO // the guest's kernel has its own of these
	}
	if err := f.openIO(how | safeFlags); err != nil {
		return p9.QID{}, 0, err
	}
	return f.s.qid(uint64(st.Dev), st.Ino, st.Mode), 0, nil
}

// openIO opens what f is, which has been seen to be a regular file or a folder.
// f is locked, or nobody else's yet.
func (f *file) openIO(how int) error {
	if f.s.open.Load() >= f.s.max {
		return unix.EMFILE
	}
	fd, err := retry(func() (int, error) { return unix.Open(f.h.proc(), how, 0) })
	if err != nil {
		return err
	}
	if how&unix.O_TRUNC != 0 {
		if err := dropSetID(fd); err != nil {
			unix.Close(fd)
			return err
		}
	}
	f.io = f.s.hold(fd)
	return nil
}

// dropSetID clears what makes a file run as its owner or group, before its
// contents change: the host's kernel leaves that out for who has CAP_FSETID
// (should_remove_suid, fs/attr.c), and the contents are a guest's.
func dropSetID(fd int) error {
	var st unix.Stat_t
	if _, err := retry(func() (int, error) { return 0, unix.Fstat(fd, &st) }); err != nil {
		return err
	}
	drop := st.Mode & unix.S_ISUID
	if st.Mode&unix.S_IXGRP != 0 {
		drop |= st.Mode & unix.S_ISGID
	}
	if drop == 0 || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil
	}
	return unix.Fchmod(fd, st.Mode&0o7777&^drop)
}

// opened returns the descriptor to read and write by.
func (f *file) opened() (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.io == nil {
		return -1, unix.EBADF
	}
	return f.io.fd, nil
}

// ReadAt implements p9.File.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	fd, err := f.opened()
	if err != nil {
		return 0, err
	}
	for n := 0; ; {
		m, err := retry(func() (int, error) { return unix.Pread(fd, p[n:], off+int64(n)) })
		if err != nil {
			if n > 0 {
				return n, nil
			}
			return 0, err
		}
		if n += m; n == len(p) {
			return n, nil
		}
		if m == 0 {
			return n, io.EOF
		}
	}
}

// WriteAt implements p9.File. A file opened with O_APPEND is appended to.
func (f *file) WriteAt(p []byte, off int64) (int, error) {
	fd, err := f.opened()
	if err != nil {
		return 0, err
	}
	if err := dropSetID(fd); err != nil {
		return 0, err
	}
	n := 0
	for n < len(p) {
		m, err := retry(func() (int, error) { return unix.Pwrite(fd, p[n:], off+int64(n)) })
		if err != nil {
			if n > 0 {
				return n, nil // the next write will meet the error
			}
			return 0, err
		}
		n += m
	}
	return n, nil
}

// maxPieces is IOV_MAX.
const maxPieces = 1024

// ReadvAt is ReadAt into several pieces. It reads once: what is missing after
// that is for the next read.
func (f *file) ReadvAt(bufs [][]byte, off int64) (int, error) {
	fd, err := f.opened()
	if err != nil {
		return 0, err
	}
	return retry(func() (int, error) { return unix.Preadv(fd, bufs[:min(len(bufs), maxPieces)], off) })
}

// ReadvResident is ReadvAt of all of bufs, unless that would wait for a disk;
// if it is false, bufs may have been filled in part.
func (f *file) ReadvResident(bufs [][]byte, off int64) bool {
	f.mu.Lock() // the descriptor stays open
	defer f.mu.Unlock()
	if f.io == nil || len(bufs) > maxPieces {
		return false
	}
	fd, want := f.io.fd, 0
	for _, b := range bufs {
		want += len(b)
	}
	var n int
	var err error
	switch f.resident {
	case residentNoWait:
		n, err = unix.Preadv2(fd, bufs, off, unix.RWF_NOWAIT)
		if err == unix.EOPNOTSUPP {
			var st unix.Statfs_t
			f.resident = residentNever
			if unix.Fstatfs(fd, &st) == nil && st.Type == unix.TMPFS_MAGIC {
				f.resident = residentAlways
			}
			return false
		}
	case residentAlways:
		n, err = unix.Preadv(fd, bufs, off)
	default:
		return false
	}
	return err == nil && n == want
}

// WritevAt is WriteAt from several pieces, in one call.
func (f *file) WritevAt(bufs [][]byte, off int64) (int, error) {
	fd, err := f.opened()
	if err != nil {
		return 0, err
	}
	if err := dropSetID(fd); err != nil {
		return 0, err
	}
	return retry(func() (int, error) { return unix.Pwritev(fd, bufs[:min(len(bufs), maxPieces)], off) })
}

// FSync implements p9.File.
func (f *file) FSync() error {
	fd, err := f.opened()
	if err != nil {
		return err
	}
	return unix.Fsync(fd)
}

// Close implements p9.File.
func (f *file) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.io != nil {
		f.io.release()
		f.io = nil
	}
	if f.h != nil {
		f.h.release()
		f.h = nil
	}
	return nil
}

// Readlink implements p9.File.
func (f *file) Readlink() (string, error) {
	b := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(f.h.fd, "", b)
	if err != nil {
		return "", err
	}
	return string(b[:n]), nil
}

// SetAttr implements p9.File.
func (f *file) SetAttr(valid p9.SetAttrMask, attr p9.SetAttr) error {
	if !f.s.writable {
		return unix.EROFS
	}
	st, err := f.h.stat()
	if err != nil {
		return err
	}
	kind := st.Mode & unix.S_IFMT
	_, now := f.s.attr(&st)
	if valid.UID && attr.UID.Ok() && attr.UID != now.UID || valid.GID && attr.GID.Ok() && attr.GID != now.GID {
		return unix.EPERM
	}
	if valid.Permissions {
		if kind == unix.S_IFLNK {
			return unix.EOPNOTSUPP
		}
		if err := f.h.chmod(kind, uint32(attr.Permissions)&permissions); err != nil {
			return err
		}
	}
	if valid.Size {
		if err := f.truncate(kind, attr.Size); err != nil {
			return err
		}
	}
	if !valid.ATime && !valid.MTime {
		return nil
	}
	when := func(valid, given bool, sec, nsec uint64) unix.Timespec {
		switch {
		case !valid:
			return unix.Timespec{Nsec: unix.UTIME_OMIT}
		case !given:
			return unix.Timespec{Nsec: unix.UTIME_NOW}
		}
		return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec % 1e9)}
	}
	return f.h.utimes(kind, [2]unix.Timespec{
		when(valid.ATime, valid.ATimeNotSystemTime, attr.ATimeSeconds, attr.ATimeNanoSeconds),
		when(valid.MTime, valid.MTimeNotSystemTime, attr.MTimeSeconds, attr.MTimeNanoSeconds),
	})
}

func (f *file) truncate(kind uint32, size uint64) error {
	switch {
	case kind == unix.S_IFDIR:
		return unix.EISDIR
	case kind != unix.S_IFREG, size > math.MaxInt64:
		return unix.EINVAL
	}
	// By the descriptor if it can: its right to write outlives a chmod.
	if fd, err := f.opened(); err == nil && shorten(fd, size) == nil {
		return nil
	}
	return f.h.withOpen(kind, unix.O_WRONLY, func(fd int) error { return shorten(fd, size) })
}

func shorten(fd int, size uint64) error {
	if err := dropSetID(fd); err != nil {
		return err
	}
	_, err := retry(func() (int, error) { return 0, unix.Ftruncate(fd, int64(size)) })
	return err
}

// Lock implements p9.File, by open file description locks. It never waits:
// the fence asks again after LockStatusBlocked. A read-only share grants every
// lock and takes none: a guest that may only read must not keep the host's
// programs out, and its kernel holds its own processes' locks apart.
func (f *file) Lock(_ int, typ p9.LockType, _ p9.LockFlags, start, length uint64, _ string) (p9.LockStatus, error) {
	fd, err := f.opened()
	if err != nil {
		return p9.LockStatusError, err
	}
	if !f.s.writable {
		if typ > p9.Unlock || start > math.MaxInt64 {
			return p9.LockStatusError, unix.EINVAL
		}
		return p9.LockStatusOK, nil
	}
	if start > math.MaxInt64 || length > math.MaxInt64-start {
		length = 0 // to the end, however long
	}
	if start > math.MaxInt64 {
		return p9.LockStatusError, unix.EINVAL
	}
	l := unix.Flock_t{Whence: io.SeekStart, Start: int64(start), Len: int64(length)}
	switch typ {
	case p9.ReadLock:
		l.Type = unix.F_RDLCK
	case p9.WriteLock:
		l.Type = unix.F_WRLCK
	case p9.Unlock:
		l.Type = unix.F_UNLCK
	default:
		return p9.LockStatusError, unix.EINVAL
	}
	switch err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &l); err {
	case nil:
		return p9.LockStatusOK, nil
	case unix.EAGAIN, unix.EACCES:
		return p9.LockStatusBlocked, nil
	default:
		return p9.LockStatusError, err
	}
}

// Renamed implements p9.File. A descriptor knows nothing of names.
func (f *file) Renamed(p9.File, string) {}

// Rename implements p9.File; the server uses RenameAt.
func (f *file) Rename(p9.File, string) error { return unix.EOPNOTSUPP }

// SetXattr implements p9.File.
func (f *file) SetXattr(string, []byte, p9.XattrFlags) error { return unix.EOPNOTSUPP }

// GetXattr implements p9.File.
func (f *file) GetXattr(string) ([]byte, error) { return nil, unix.EOPNOTSUPP }

// ListXattrs implements p9.File.
func (f *file) ListXattrs() ([]string, error) { return nil, unix.EOPNOTSUPP }

// RemoveXattr implements p9.File.
func (f *file) RemoveXattr(string) error { return unix.EOPNOTSUPP }
