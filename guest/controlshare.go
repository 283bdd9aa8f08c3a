package guest

import (
	"io"
	"sync/atomic"
	"time"

	"github.com/hugelgupf/p9/fsimpl/templatefs"
	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/internal/pipe"
)

// controlPoll is how long a read of an empty from-host takes. It cannot wait
// for ever: a device is stopped only when all its requests are answered.
const controlPoll = 250 * time.Millisecond

// controlShare is a control line made of two files on a 9P share, which carry
// in one message what costs a serial port an exit for each byte. Offsets mean
// nothing: what is written to to-host, and read from from-host, are streams.
type controlShare struct {
	toHost, fromHost *pipe.Pipe
	hurry            atomic.Bool // reads do not wait
}

var _ p9.Attacher = (*controlShare)(nil)

func newControlShare() *controlShare {
	return &controlShare{toHost: pipe.New(), fromHost: pipe.New()}
}

// hasten makes reads end at once, until they may take their time again: a
// machine does not stand still before they have ended.
func (s *controlShare) hasten() (enough func()) {
	s.hurry.Store(true)
	s.fromHost.Hurry()
	return func() { s.hurry.Store(false) }
}

// Attach implements p9.Attacher.
func (s *controlShare) Attach() (p9.File, error) { return &controlFile{share: s}, nil }

// controlFile is the folder (name is empty) or one of its files.
type controlFile struct {
	templatefs.ReadOnlyFile
	templatefs.NilCloser
	p9.DefaultWalkGetAttr
	share *controlShare
	name  string
}

var _ p9.File = (*controlFile)(nil)

func (f *controlFile) qid() p9.QID {
	switch f.name {
	case control.ToHost:
		return p9.QID{Type: p9.TypeRegular, Path: 2}
	case control.FromHost:
		return p9.QID{Type: p9.TypeRegular, Path: 3}
	}
	return p9.QID{Type: p9.TypeDir, Path: 1}
}

// Walk implements p9.File.
func (f *controlFile) Walk(names []string) ([]p9.QID, p9.File, error) {
	at := &controlFile{share: f.share, name: f.name}
	var qids []p9.QID
	for _, n := range names {
		if at.name != "" {
			return nil, nil, linux.ENOTDIR
		}
		if n != control.ToHost && n != control.FromHost {
			return nil, nil, linux.ENOENT
		}
		at.name = n
		qids = append(qids, at.qid())
	}
	return qids, at, nil
}

// GetAttr implements p9.File. The size is one that is never reached: some
// kernels do not read beyond it.
func (f *controlFile) GetAttr(p9.AttrMask) (p9.QID, p9.AttrMask, p9.Attr, error) {
	a := p9.Attr{Mode: p9.ModeDirectory | 0o500, NLink: 2, BlockSize: 4096}
	switch f.name {
	case control.ToHost:
		a.Mode, a.NLink = p9.ModeRegular|0o200, 1
	case control.FromHost:
		a.Mode, a.NLink, a.Size = p9.ModeRegular|0o400, 1, 1<<60
	}
	return f.qid(), p9.AttrMask{Mode: true, NLink: true, UID: true, GID: true, Size: true}, a, nil
}

// Open implements p9.File.
func (f *controlFile) Open(flags p9.OpenFlags) (p9.QID, uint32, error) {
	if flags.Mode() != map[string]p9.OpenFlags{control.ToHost: p9.WriteOnly, control.FromHost: p9.ReadOnly, "": p9.ReadOnly}[f.name] {
		return p9.QID{}, 0, linux.EACCES
	}
	return f.qid(), 0, nil
}

// ReadAt implements p9.File: 0 bytes mean that there are none now.
func (f *controlFile) ReadAt(p []byte, _ int64) (int, error) {
	switch f.name {
	case "":
		return 0, linux.EISDIR
	case control.ToHost:
		return 0, linux.EACCES
	}
	wait := controlPoll
	if f.share.hurry.Load() {
		wait = 0
	}
	n, err := f.share.fromHost.ReadSoon(p, wait)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

// WriteAt implements p9.File. It waits while the host has not taken what was
// written before.
func (f *controlFile) WriteAt(p []byte, _ int64) (int, error) {
	if f.name != control.ToHost {
		return 0, linux.EACCES
	}
	n, err := f.share.toHost.Write(p)
	if err != nil {
		err = linux.EPIPE
	}
	return n, err
}

// Readdir implements p9.File.
func (f *controlFile) Readdir(offset uint64, count uint32) (p9.Dirents, error) {
	if f.name != "" {
		return nil, linux.ENOTDIR
	}
	var out p9.Dirents
	for i, n := range []string{control.ToHost, control.FromHost} {
		if uint64(i) >= offset {
			e := &controlFile{name: n}
			out = append(out, p9.Dirent{QID: e.qid(), Offset: uint64(i) + 1, Type: p9.TypeRegular, Name: n})
		}
	}
	return out, nil
}

// StatFS implements p9.File.
func (f *controlFile) StatFS() (p9.FSStat, error) {
	return p9.FSStat{Type: 0x01021997, BlockSize: 4096, NameLength: 255}, nil // V9FS_MAGIC
}
