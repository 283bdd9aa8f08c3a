package cowdisk

import (
	"io"
	"time"
)

// File is everything a layer asks of the file it lies in. It is small so that other things can stand in for a file: a crash-simulating one
// in tests, a remote store behind a base image. All methods may be called from several goroutines.
type File interface {
	io.ReaderAt // short only at the end of the file
	io.WriterAt
	// ReadvAt and WritevAt move consecutive bytes from or to several buffers. They may move less than asked without an error; the caller
	// goes on from there. ReadvAt returns 0, nil or io.EOF at the end of the file.
	ReadvAt(bufs [][]byte, off int64) (int, error)
	WritevAt(bufs [][]byte, off int64) (int, error)
	// Sync makes what was written (and the file's size) durable: fdatasync.
	Sync() error
	// SyncAll is Sync with the modification time: fsync.
	SyncAll() error
	Truncate(size int64) error
	// PunchHole makes a range read as zeros and frees its space; the size stays. ZeroRange does the same but keeps the space.
	// errors.ErrUnsupported when the file cannot do that.
	PunchHole(off, n int64) error
	ZeroRange(off, n int64) error
	// NextData finds the first range at or after off that may hold data: [start, end). io.EOF when only holes follow. A file that knows
	// no holes returns [off, size).
	NextData(off int64) (start, end int64, err error)
	Stat() (FileInfo, error)
	// Touch makes the modification time the present, by the clock that writes take theirs from.
	Touch() error
	Close() error
}

// FileInfo describes an open File.
type FileInfo struct {
	Size      int64     // bytes; for a device its capacity
	ModTime   time.Time // zero when it means nothing, as for a device
	Allocated int64     // bytes that the file takes up
	Directory bool
	Device    bool   // a block device
	ID        FileID // equal for the same file under two names; zero = unknown
	Nameless  bool   // it was removed while it is open
}

// FileID identifies a file on this machine.
type FileID struct{ Device, Inode uint64 }

// mtime32 is the modification time as headers store it.
func (i FileInfo) mtime32() uint32 {
	if i.ModTime.IsZero() {
		return 0
	}
	return uint32(i.ModTime.Unix())
}

// OpenMode says how a file is opened. A file opened for writing is locked against everybody else; one opened for reading is locked against
// writers. A lock that cannot be had at once is ErrLocked.
type OpenMode struct {
	Write  bool
	NoLock bool // only without Write
}

// FS opens files. Paths are as Resolve made them.
type FS interface {
	Open(path string, m OpenMode) (File, error)
	// OpenBeneath opens rel below the folder root; no symlink on the way may lead out of root.
	OpenBeneath(root, rel string, m OpenMode) (File, error)
	// LookBeneath looks at rel below the folder root without opening it: whether it is a folder or a symlink, and where that leads ("" = it
	// is none). No symlink on the way there may lead out of root.
	LookBeneath(root, rel string) (target string, dir bool, err error)
	// Create makes a file that has no name until it is published; closing it unpublished leaves nothing behind.
	Create(path string) (NewFile, error)
	// Resolve makes a path absolute, without symlinks, "." and "..": the name of what opening path would open. Relative paths start at
	// the current folder. The last element need not exist.
	Resolve(path string) (string, error)
}

// NewFile is a file under construction.
type NewFile interface {
	File
	// Publish gives the file the name it was created for: all of it appears at once. Without replace an existing file is ErrExists. With
	// replace the new file takes over the permissions of the old one. With durable, contents and name are on disk when it returns.
	Publish(replace, durable bool) error
}

// readFull fills bufs... p from f; what lies beyond the end of the file reads as zeros.
func readFull(f File, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := f.ReadAt(p, off)
		if n == len(p) {
			return nil
		}
		if err != nil && err != io.EOF {
			return err
		}
		if n == 0 {
			clear(p)
			return nil
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// writeFull writes all of p.
func writeFull(f File, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := f.WriteAt(p, off)
		if n == len(p) {
			return nil
		}
		if err != nil {
			return err
		}
		if n <= 0 {
			return io.ErrShortWrite
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}
