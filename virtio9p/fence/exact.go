package fence

import (
	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
)

// exactAttacher is an Attacher whose errors reach the client as they are. The
// server asks errors.Is(err, os.ErrPermission) and the like first, which turns
// EPERM into EACCES and ENOTEMPTY into EEXIST.
type exactAttacher struct {
	a p9.Attacher
	s *Session
}

func (a exactAttacher) Attach() (p9.File, error) {
	f, err := a.a.Attach()
	return wrap(a.s, f), exact(err)
}

// exactFile passes everything on to File, and its errors through exact; what
// is opened has an iounit, and of ReadAt and WriteAt see inplace.go.
type exactFile struct {
	p9.File
	s *Session
}

func wrap(s *Session, f p9.File) p9.File {
	if f == nil {
		return nil
	}
	return exactFile{f, s}
}

func unwrap(f p9.File) p9.File {
	if e, ok := f.(exactFile); ok {
		return e.File
	}
	return f
}

func (f exactFile) Walk(names []string) ([]p9.QID, p9.File, error) {
	qids, to, err := f.File.Walk(names)
	return qids, wrap(f.s, to), exact(err)
}

func (f exactFile) WalkGetAttr(names []string) ([]p9.QID, p9.File, p9.AttrMask, p9.Attr, error) {
	qids, to, mask, attr, err := f.File.WalkGetAttr(names)
	return qids, wrap(f.s, to), mask, attr, exact(err)
}

func (f exactFile) StatFS() (p9.FSStat, error) {
	st, err := f.File.StatFS()
	return st, exact(err)
}

func (f exactFile) Open(mode p9.OpenFlags) (p9.QID, uint32, error) {
	qid, unit, err := f.File.Open(mode)
	return qid, f.s.iounit(unit), exact(err)
}

func (f exactFile) FSync() error { return exact(f.File.FSync()) }

func (f exactFile) Create(name string, flags p9.OpenFlags, perm p9.FileMode, uid p9.UID, gid p9.GID) (p9.File, p9.QID, uint32, error) {
	to, qid, unit, err := f.File.Create(name, flags, perm, uid, gid)
	return wrap(f.s, to), qid, f.s.iounit(unit), exact(err)
}

// iounit is by how many bytes a file is best read and written: as it says, or
// the most whole pages that fit into a message. Linux takes all of msize
// otherwise (p9_client_read, net/9p/client.c), and each of its pages then gets
// something of two of the host's.
func (s *Session) iounit(unit uint32) uint32 {
	if unit == 0 {
		unit = (s.Msize() - ioHeader) &^ (pageSize - 1)
	}
	return unit
}

func (f exactFile) Mkdir(name string, perm p9.FileMode, uid p9.UID, gid p9.GID) (p9.QID, error) {
	qid, err := f.File.Mkdir(name, perm, uid, gid)
	return qid, exact(err)
}

func (f exactFile) Symlink(oldName, newName string, uid p9.UID, gid p9.GID) (p9.QID, error) {
	qid, err := f.File.Symlink(oldName, newName, uid, gid)
	return qid, exact(err)
}

func (f exactFile) Link(target p9.File, newName string) error {
	return exact(f.File.Link(unwrap(target), newName))
}

func (f exactFile) Mknod(name string, mode p9.FileMode, major, minor uint32, uid p9.UID, gid p9.GID) (p9.QID, error) {
	qid, err := f.File.Mknod(name, mode, major, minor, uid, gid)
	return qid, exact(err)
}

// RenameAt does nothing, like rename(2), when both names are links to one file.
// The server must not hear that it is done: it would take one for removed.
func (f exactFile) RenameAt(oldName string, newDir p9.File, newName string) error {
	if r := f.s.renaming(); r != nil && sameFile(f.File, oldName, unwrap(newDir), newName) {
		var b [headerLen]byte
		putHeader(b[:], headerLen, r.typ+1, r.tag)
		r.x.Write(b[:])
		r.answered = true
		return linux.EEXIST
	}
	return exact(f.File.RenameAt(oldName, unwrap(newDir), newName))
}

// renaming is the rename that runs alone.
func (s *Session) renaming() *request {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.inflight {
		if r.typ == trename || r.typ == trenamat {
			return r
		}
	}
	return nil
}

// sameFile reports whether two names in two folders are of one file.
func sameFile(a p9.File, nameA string, b p9.File, nameB string) bool {
	qid := func(dir p9.File, name string) (p9.QID, bool) {
		qids, f, err := dir.Walk([]string{name})
		if err != nil || len(qids) != 1 {
			return p9.QID{}, false
		}
		f.Close()
		return qids[0], true
	}
	to, ok := qid(b, nameB)
	if !ok {
		return false
	}
	from, ok := qid(a, nameA)
	return ok && from.Path == to.Path && from.Type == to.Type
}

func (f exactFile) UnlinkAt(name string, flags uint32) error {
	return exact(f.File.UnlinkAt(name, flags))
}

func (f exactFile) Readdir(offset uint64, count uint32) (p9.Dirents, error) {
	entries, err := f.File.Readdir(offset, count)
	return entries, exact(err)
}

func (f exactFile) Readlink() (string, error) {
	target, err := f.File.Readlink()
	return target, exact(err)
}

func (f exactFile) Renamed(newDir p9.File, newName string) {
	f.File.Renamed(unwrap(newDir), newName)
}
