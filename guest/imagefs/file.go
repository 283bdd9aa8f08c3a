package imagefs

import (
	"io"
	"slices"
	"sync"
	"time"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
)

// file is a client's reference to a node, which it may have opened.
type file struct {
	n *node

	mu     sync.Mutex
	opened content
	text   *text // what opened is, if it is shared
	held   int   // bytes of opened that are accounted for
	size   int64
	mtime  time.Time
}

var _ p9.File = (*file)(nil)

// Walk implements p9.File.
func (f *file) Walk(names []string) ([]p9.QID, p9.File, error) {
	n := f.n
	var qids []p9.QID
	for _, name := range names {
		if n.children == nil {
			return nil, nil, linux.ENOTDIR
		}
		children := n.children()
		i := slices.IndexFunc(children, func(c *node) bool { return c.name == name })
		if i < 0 {
			return nil, nil, linux.ENOENT
		}
		n = children[i]
		qids = append(qids, n.qid)
	}
	return qids, &file{n: n}, nil
}

// WalkGetAttr implements p9.File. The server walks with it and wants to know
// the mode only; anything else could be work.
func (f *file) WalkGetAttr(names []string) ([]p9.QID, p9.File, p9.AttrMask, p9.Attr, error) {
	qids, to, err := f.Walk(names)
	if err != nil {
		return nil, nil, p9.AttrMask{}, p9.Attr{}, err
	}
	return qids, to, p9.AttrMask{Mode: true}, p9.Attr{Mode: to.(*file).n.mode()}, nil
}

func (n *node) mode() p9.FileMode {
	switch {
	case n.children != nil:
		return p9.ModeDirectory | 0o555
	case n.content != nil:
		return p9.ModeRegular | 0o444
	}
	return p9.ModeSymlink | 0o777
}

// blockSize is what st_blksize says. Tools read that much at a time, so a
// round trip should be worth it.
const blockSize = 128 << 10

// GetAttr implements p9.File.
func (f *file) GetAttr(p9.AttrMask) (p9.QID, p9.AttrMask, p9.Attr, error) {
	n := f.n
	f.mu.Lock()
	opened, size, mtime := f.opened, f.size, f.mtime
	f.mu.Unlock()
	if _, snapshot := opened.(fixed); !snapshot {
		size, mtime = n.observe(nil)
	}
	attr := p9.Attr{Mode: n.mode(), NLink: 1, BlockSize: blockSize}
	switch {
	case n.children != nil:
		attr.NLink = 2
		for _, c := range n.children() {
			if c.children != nil {
				attr.NLink++
			}
		}
	case n.content == nil:
		size = int64(len(n.target))
	}
	attr.Size = uint64(size)
	attr.Blocks = (attr.Size + 511) / 512
	sec, nsec := uint64(mtime.Unix()), uint64(mtime.Nanosecond())
	attr.ATimeSeconds, attr.ATimeNanoSeconds = sec, nsec
	attr.MTimeSeconds, attr.MTimeNanoSeconds = sec, nsec
	attr.CTimeSeconds, attr.CTimeNanoSeconds = sec, nsec
	return n.qid, p9.AttrMask{Mode: true, NLink: true, UID: true, GID: true, RDev: true, ATime: true, MTime: true, CTime: true, INo: true, Size: true, Blocks: true}, attr, nil
}

// openTruncate is O_TRUNC, whose value on the wire is that of Linux.
const openTruncate p9.OpenFlags = 0o1000

// Open implements p9.File. A file's contents are those of this moment.
func (f *file) Open(flags p9.OpenFlags) (p9.QID, uint32, error) {
	n := f.n
	if flags.Mode() != p9.ReadOnly || flags&openTruncate != 0 {
		return p9.QID{}, 0, linux.EROFS
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.opened != nil {
		return p9.QID{}, 0, linux.EINVAL
	}
	if n.content != nil {
		c := n.content()
		if m, ok := c.(*extentMap); ok {
			if t := f.share(m); t != nil {
				f.text, c = t, t.fixed
			}
		} else if s, ok := c.(fixed); ok {
			if n.Tree.take(len(s.b) + fileCost) {
				f.held = len(s.b) + fileCost
			} else {
				c = live{n.content}
			}
		}
		f.opened = c
		if s, ok := c.(fixed); ok {
			_, f.mtime = n.observe(c)
			f.size = int64(len(s.b))
		}
	}
	return n.qid, 0, nil
}

// fileCost is about what holding a short text costs beside its bytes.
const fileCost = 64

// share is the text of the map m as of now; nil if it is not to be held.
func (f *file) share(m *extentMap) *text {
	f.n.identity.mu.Lock()
	defer f.n.identity.mu.Unlock()
	t, _ := f.n.hold(f.n.key(), m)
	return t
}

// ReadAt implements p9.File.
func (f *file) ReadAt(p []byte, off int64) (int, error) {
	if f.n.children != nil {
		return 0, linux.EISDIR
	}
	f.mu.Lock()
	c := f.opened
	f.mu.Unlock()
	if c == nil || off < 0 {
		return 0, linux.EINVAL
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := c.ReadAt(p, off)
	if n > 0 && err != io.EOF {
		return n, nil // the next read will meet the error
	}
	return n, err
}

// Readdir implements p9.File. Offsets are positions in the list of children,
// which only ever grows at its end.
func (f *file) Readdir(off uint64, count uint32) (p9.Dirents, error) {
	if f.n.children == nil {
		return nil, linux.ENOTDIR
	}
	children := f.n.children()
	var entries p9.Dirents
	for room := int(count); off < uint64(len(children)); off++ {
		c := children[off]
		room -= 13 + 8 + 1 + 2 + len(c.name) // qid offset type name
		if room < 0 && entries != nil {
			break
		}
		entries = append(entries, p9.Dirent{QID: c.qid, Offset: off + 1, Type: direntType(c.mode()), Name: c.name})
	}
	return entries, nil
}

// direntType is d_type of getdents(2), which is what 9P2000.L means by an
// entry's type (the p9 library's documentation suggests a QID type).
func direntType(m p9.FileMode) p9.QIDType { return p9.QIDType(m.FileType() >> 12) }

// Readlink implements p9.File.
func (f *file) Readlink() (string, error) {
	if f.n.children != nil || f.n.content != nil {
		return "", linux.EINVAL
	}
	return f.n.target, nil
}

// StatFS implements p9.File: V9FS_MAGIC, and no room at all.
func (f *file) StatFS() (p9.FSStat, error) {
	return p9.FSStat{Type: 0x01021997, BlockSize: 4096, NameLength: 255}, nil
}

// Close implements p9.File.
func (f *file) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.text != nil {
		f.n.drop(f.text)
	}
	f.n.Tree.held.Add(-int64(f.held))
	if m, ok := f.opened.(*extentMap); ok {
		m.close()
	}
	f.opened, f.text, f.held = nil, nil, 0
	return nil
}

// FSync implements p9.File: what is there is there.
func (f *file) FSync() error { return nil }

// Lock implements p9.File. There is nothing to protect from anybody.
func (f *file) Lock(int, p9.LockType, p9.LockFlags, uint64, uint64, string) (p9.LockStatus, error) {
	return p9.LockStatusError, nil
}

// Renamed implements p9.File: it does not happen.
func (f *file) Renamed(p9.File, string) {}

// The rest would change something.

func (f *file) readOnly() error {
	if f.n.children == nil {
		return linux.ENOTDIR
	}
	return linux.EROFS
}

// SetAttr implements p9.File.
func (f *file) SetAttr(p9.SetAttrMask, p9.SetAttr) error { return linux.EROFS }

// WriteAt implements p9.File.
func (f *file) WriteAt([]byte, int64) (int, error) { return 0, linux.EROFS }

// Create implements p9.File.
func (f *file) Create(string, p9.OpenFlags, p9.FileMode, p9.UID, p9.GID) (p9.File, p9.QID, uint32, error) {
	return nil, p9.QID{}, 0, f.readOnly()
}

// Mkdir implements p9.File.
func (f *file) Mkdir(string, p9.FileMode, p9.UID, p9.GID) (p9.QID, error) {
	return p9.QID{}, f.readOnly()
}

// Symlink implements p9.File.
func (f *file) Symlink(string, string, p9.UID, p9.GID) (p9.QID, error) {
	return p9.QID{}, f.readOnly()
}

// Mknod implements p9.File.
func (f *file) Mknod(string, p9.FileMode, uint32, uint32, p9.UID, p9.GID) (p9.QID, error) {
	return p9.QID{}, f.readOnly()
}

// Link implements p9.File.
func (f *file) Link(p9.File, string) error { return f.readOnly() }

// Rename implements p9.File.
func (f *file) Rename(p9.File, string) error { return linux.EROFS }

// RenameAt implements p9.File.
func (f *file) RenameAt(string, p9.File, string) error { return f.readOnly() }

// UnlinkAt implements p9.File.
func (f *file) UnlinkAt(string, uint32) error { return f.readOnly() }

// SetXattr implements p9.File.
func (f *file) SetXattr(string, []byte, p9.XattrFlags) error { return linux.EOPNOTSUPP }

// GetXattr implements p9.File.
func (f *file) GetXattr(string) ([]byte, error) { return nil, linux.EOPNOTSUPP }

// ListXattrs implements p9.File.
func (f *file) ListXattrs() ([]string, error) { return nil, linux.EOPNOTSUPP }

// RemoveXattr implements p9.File.
func (f *file) RemoveXattr(string) error { return linux.EOPNOTSUPP }
