package qcow2

import (
	"io"
	"os"
	"sync/atomic"
)

// Options say how to open an image.
type Options struct {
	// Name is what errors call the image. Open sets it to the path if it is empty.
	Name string
	// Backing is what the disk shows where the image has nothing; beyond its end are zeros. It is read only through ReadAt, and stays the
	// caller's. Without it an image that names a backing file is refused: its name is never followed.
	Backing io.ReaderAt
	// TableMemory and ClusterMemory bound the memory for L2 tables and for decompressed clusters, in bytes; 0 = 4 MiB and 16 MiB. The least
	// are four pieces of a table (4 KiB each) and four clusters.
	TableMemory, ClusterMemory int64
}

// Image is an open image: the contents of its disk. Any number of goroutines may use it.
type Image struct {
	file      io.ReaderAt
	fileSize  int64
	name      string
	backing   io.ReaderAt
	hdr       Header
	l1        []uint64
	words     int64 // in an L2 entry: 1, extended 2
	sliceLen  int64 // bytes of an L2 table that are read at once
	sliceSpan int64 // bytes of the disk that they describe

	tables    *cache[uint64]
	clusters  *cache[byte] // decompressed
	unpackers [unpackers]unpacker

	closed atomic.Bool
	owned  io.Closer
}

// Open opens the image file at path for reading. The file is not locked.
//
// Errors: those of New and of the file system.
func Open(path string, o Options) (*Image, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if o.Name == "" {
		o.Name = path
	}
	// Not Stat: a device has a size, too.
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		f.Close()
		return nil, err
	}
	m, err := New(f, size, o)
	if err != nil {
		f.Close()
		return nil, err
	}
	m.owned = f
	return m, nil
}

// New opens the image in f, which has size bytes. f stays the caller's, and must not change while the image is in use.
//
// Errors (errors.Is): ErrNotQCOW2, ErrVersion, ErrHeader, ErrTruncated, ErrDirty, ErrMarked, ErrEncrypted, ErrExternalData, ErrFeature,
// ErrBacking, ErrRead with what f returned.
func New(f io.ReaderAt, size int64, o Options) (*Image, error) {
	if o.Name == "" {
		o.Name = "qcow2 image"
	}
	if o.TableMemory == 0 {
		o.TableMemory = 4 << 20
	}
	if o.ClusterMemory == 0 {
		o.ClusterMemory = 16 << 20
	}
	h, first, err := readHeader(f, size, o.Name)
	if err != nil {
		return nil, err
	}
	if err := h.usable(first, o.Name, o.Backing != nil); err != nil {
		return nil, err
	}
	m := &Image{file: f, fileSize: size, name: o.Name, backing: o.Backing, hdr: h, words: 1}
	if h.ExtendedL2 {
		m.words = 2
	}
	m.sliceLen = min(h.ClusterSize, sliceBytes)
	m.sliceSpan = m.sliceLen / (8 * m.words) * h.ClusterSize
	if err := m.loadL1(); err != nil {
		return nil, err
	}
	m.tables = newCache[uint64](o.TableMemory, m.sliceLen, h.Size/m.sliceSpan+1)
	m.clusters = newCache[byte](o.ClusterMemory, h.ClusterSize, h.Size/h.ClusterSize+1)
	return m, nil
}

// Size is the size of the disk in bytes.
func (m *Image) Size() int64 { return m.hdr.Size }

// Header is what the image says about itself.
func (m *Image) Header() Header { return m.hdr }

// Close frees what the image holds, and the file if Open opened it. Reads that run meanwhile may fail. It may be called more than once.
func (m *Image) Close() error {
	if m.closed.Swap(true) {
		return nil
	}
	for i := range m.unpackers {
		m.unpackers[i].close()
	}
	m.tables.drop()
	m.clusters.drop()
	if m.owned != nil {
		return m.owned.Close()
	}
	return nil
}

// ReadAt reads the disk's contents as io.ReaderAt says: io.EOF at the end of the disk. What the file lost of its last cluster reads as
// zeros, as QEMU does.
//
// Errors: ErrCorrupt, ErrCompressed, ErrTruncated, ErrClosed, ErrRange (off is negative), ErrRead with what the file or the backing file
// returned. The number of bytes before the error is right.
func (m *Image) ReadAt(p []byte, off int64) (int, error) {
	switch {
	case m.closed.Load():
		return 0, m.fail("", ErrClosed, "", "")
	case off < 0:
		return 0, m.fail("", ErrRange, "a negative offset", "")
	case off >= m.hdr.Size && len(p) > 0:
		return 0, io.EOF
	}
	want := len(p)
	p = p[:min(int64(want), max(m.hdr.Size-off, 0))]
	for done := 0; done < len(p); {
		pos := off + int64(done)
		r, err := m.find(pos, int64(len(p)-done))
		if err != nil {
			return done, err
		}
		if err := m.read(p[done:done+int(r.length)], pos, r); err != nil {
			return done, err
		}
		done += int(r.length)
	}
	if len(p) < want {
		return len(p), io.EOF
	}
	return len(p), nil
}

// read reads p, which is all of r, at off.
func (m *Image) read(p []byte, off int64, r run) error {
	switch {
	case r.packed:
		return m.readPacked(p, off)
	case r.kind == Data:
		if err := readZeros(m.file, p, r.host); err != nil {
			return m.wrap("data cluster", ErrRead, err)
		}
	case r.kind == Absent && m.backing != nil:
		if err := readZeros(m.backing, p, off); err != nil {
			return m.wrap("backing file", ErrRead, err)
		}
	default:
		clear(p)
	}
	return nil
}

func (m *Image) fail(field string, kind error, detail, remedy string) error {
	return &Error{Name: m.name, Field: field, Kind: kind, Detail: detail, Remedy: remedy}
}

func (m *Image) wrap(field string, kind, err error) error {
	return &Error{Name: m.name, Field: field, Kind: kind, Err: err}
}
