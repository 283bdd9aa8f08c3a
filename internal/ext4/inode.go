package ext4

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"
)

// The file types in a mode, as stat(2) has them.
const (
	ModeType    = 0o170000
	ModeSocket  = 0o140000
	ModeSymlink = 0o120000
	ModeFile    = 0o100000
	ModeBlock   = 0o060000
	ModeDir     = 0o040000
	ModeChar    = 0o020000
	ModeFIFO    = 0o010000
)

const (
	maxLinks = 65000
	maxFile  = 1 << 44 // 16 TiB: what 32-bit block numbers reach
)

// Attr is what an inode has beside names and contents.
type Attr struct {
	Mode         uint32 // type and permissions as stat(2) has them
	UID, GID     uint32
	MTime        time.Time // what is also said of access, change and birth
	Major, Minor uint32    // of devices: 12 and 20 bits
	Target       string    // of symbolic links
	Xattrs       map[string][]byte
}

// Inode is a file of the Writer that made it.
type Inode struct {
	Attr
	size     int64
	extents  []extent
	children map[string]*Inode // of folders
	links    int               // names; a folder's own are not counted
	blocks   int64             // on disk, of all kinds; known once it is laid out
	num      uint32            // given by Finish
	block    [60]byte          // what i_block will be
	index    bool              // a folder with an index
	xattr    xattrs
	placed   bool
}

// Dir reports whether the inode is a folder.
func (n *Inode) Dir() bool { return n.Mode&ModeType == ModeDir }

// Size is the length of a file's contents in bytes.
func (n *Inode) Size() int64 { return n.size }

// Lookup is the file of that name in folder n, or nil.
func (n *Inode) Lookup(name string) *Inode { return n.children[name] }

// Names are those in folder n, sorted.
func (n *Inode) Names() []string { return slices.Sorted(maps.Keys(n.children)) }

// Add makes a file, called name in folder dir.
//
// Errors: ErrName, ErrExists, ErrInodes, ErrMode, ErrSymlink, ErrXattr.
func (w *Writer) Add(dir *Inode, name string, a Attr) (*Inode, error) {
	if w.inodes >= w.o.MaxInodes {
		return nil, fmt.Errorf("%w: %d are allowed", ErrInodes, w.o.MaxInodes)
	}
	n := &Inode{}
	if err := n.set(a); err != nil {
		return nil, err
	}
	if n.Dir() {
		n.children = map[string]*Inode{}
	}
	if err := w.Link(dir, name, n); err != nil {
		return nil, err
	}
	w.inodes++
	return n, nil
}

// SetAttr changes what n has, but not its type.
//
// Errors: ErrMode, ErrSymlink, ErrXattr.
func (w *Writer) SetAttr(n *Inode, a Attr) error {
	if a.Mode&ModeType != n.Mode&ModeType {
		return fmt.Errorf("%w: it cannot change", ErrMode)
	}
	return n.set(a)
}

func (n *Inode) set(a Attr) error {
	switch a.Mode & ModeType {
	case ModeSocket, ModeFile, ModeDir, ModeFIFO:
	case ModeBlock, ModeChar:
		if a.Major >= 1<<12 || a.Minor >= 1<<20 {
			return fmt.Errorf("%w: no device has the number %d:%d", ErrMode, a.Major, a.Minor)
		}
	case ModeSymlink:
		if l := len(a.Target); l == 0 || l >= blockSize || bytes.IndexByte([]byte(a.Target), 0) >= 0 {
			return fmt.Errorf("%w: it has 1 to %d bytes, none of them NUL; this one has %d", ErrSymlink, blockSize-1, l)
		}
	default:
		return fmt.Errorf("%w: mode %#o", ErrMode, a.Mode)
	}
	if a.Mode&^uint32(ModeType|0o7777) != 0 {
		return fmt.Errorf("%w: mode %#o", ErrMode, a.Mode)
	}
	x, err := packXattrs(a.Xattrs)
	if err != nil {
		return err
	}
	n.Attr, n.xattr = a, x
	n.Xattrs = nil // held packed
	return nil
}

// Link gives n one more name, in folder dir.
//
// Errors: ErrName, ErrExists, ErrLinks.
func (w *Writer) Link(dir *Inode, name string, n *Inode) error {
	if l := len(name); l == 0 || l > 255 || name == "." || name == ".." || bytes.ContainsAny([]byte(name), "/\x00") {
		return fmt.Errorf("%w: %d bytes; 1 to 255 are allowed, none of them NUL or a slash, and neither . nor .. alone", ErrName, l)
	}
	switch {
	case dir.children[name] != nil:
		return ErrExists
	case n.Dir() && n.links > 0:
		return fmt.Errorf("%w: a folder has one name", ErrLinks)
	case n.links >= maxLinks:
		return fmt.Errorf("%w: a file has at most %d", ErrLinks, maxLinks)
	}
	dir.children[name] = n
	n.links++
	return nil
}

// Unlink takes a name away, and with the last one the file; a folder with all
// that is in it.
func (w *Writer) Unlink(dir *Inode, name string) error {
	n := dir.children[name]
	if n == nil {
		return nil
	}
	delete(dir.children, name)
	todo := []*Inode{n}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if n.links--; n.links > 0 {
			continue
		}
		for _, name := range n.Names() { // sorted: what is given back is the same each time
			todo = append(todo, n.children[name])
		}
		w.inodes--
		es := n.extents
		n.children, n.extents = nil, nil
		if err := w.release(es); err != nil {
			return err
		}
	}
	return nil
}

// Write appends what r has to file n. Blocks of zeros take no space.
//
// Errors: ErrFull, those of r and of the disk.
func (w *Writer) Write(n *Inode, r io.Reader) error {
	if n.Mode&ModeType != ModeFile || n.size%blockSize != 0 {
		return fmt.Errorf("%w: only a file takes contents, once", ErrMode)
	}
	for {
		k, err := fill(r, w.buf)
		if n.size+int64(k) > maxFile {
			return fmt.Errorf("%w: a file has at most %d bytes", ErrFull, int64(maxFile))
		}
		if err2 := w.append(n, w.buf[:k]); err2 != nil {
			return err2
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// fill reads until p is full or r ends, which is io.EOF and nothing else:
// io.ReadFull would make a reader that was cut off a good end.
func fill(r io.Reader, p []byte) (int, error) {
	n := 0
	for n < len(p) {
		k, err := r.Read(p[n:])
		n += k
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

func (w *Writer) append(n *Inode, p []byte) error {
	for len(p) > 0 {
		data, k := run(p)
		if data {
			logical := n.size / blockSize
			e, err := w.alloc(int64(k+blockSize-1) / blockSize)
			if err != nil {
				return err
			}
			e.logical = logical
			k = min(k, int(e.n)*blockSize)
			n.extents = addExtent(n.extents, e)
			if err := w.out.write(p[:k], e.phys*blockSize); err != nil {
				return err
			}
			if pad := int(e.n)*blockSize - k; pad > 0 { // keeps the stream of writes in one piece
				if err := w.out.write(make([]byte, pad), e.phys*blockSize+int64(k)); err != nil {
					return err
				}
			}
		}
		n.size += int64(k)
		p = p[k:]
	}
	return nil
}

// run is how many bytes at the begin of p are in blocks with data, or in
// blocks of zeros.
func run(p []byte) (data bool, n int) {
	for n < len(p) {
		b := p[n:min(n+blockSize, len(p))]
		d := !zero(b)
		if n == 0 {
			data = d
		} else if d != data {
			break
		}
		n += len(b)
	}
	return data, n
}

func zero(b []byte) bool {
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// bytes is the inode as it is on disk.
func (n *Inode) bytes() []byte {
	b := make([]byte, inodeSize)
	le := binary.LittleEndian
	le.PutUint16(b[0:], uint16(n.Mode))
	le.PutUint16(b[2:], uint16(n.UID))
	le.PutUint16(b[24:], uint16(n.GID))
	le.PutUint16(b[120:], uint16(n.UID>>16))
	le.PutUint16(b[122:], uint16(n.GID>>16))
	le.PutUint32(b[4:], uint32(n.size))
	le.PutUint32(b[108:], uint32(n.size>>32))
	links := n.links
	if n.Dir() {
		links = 2
		for _, c := range n.children {
			if c.Dir() {
				links++
			}
		}
		if links > maxLinks {
			links = 1 // the feature dir_nlink: nobody counts
		}
	}
	le.PutUint16(b[26:], uint16(links))
	sectors := n.blocks * (blockSize / 512)
	le.PutUint32(b[28:], uint32(sectors))
	le.PutUint16(b[116:], uint16(sectors>>32))
	var flags uint32
	if t := n.Mode & ModeType; t == ModeFile || t == ModeDir || t == ModeSymlink && n.size >= 60 {
		flags |= 0x80000 // extents
	}
	if n.index {
		flags |= 0x1000
	}
	le.PutUint32(b[32:], flags)
	copy(b[40:], n.block[:])
	sec, extra := stamp(n.MTime)
	for _, at := range []int{8, 12, 16, 144} {
		le.PutUint32(b[at:], sec)
	}
	le.PutUint16(b[128:], 32)
	for _, at := range []int{132, 136, 140, 148} {
		le.PutUint32(b[at:], extra)
	}
	le.PutUint32(b[104:], uint32(n.xattr.at))
	copy(b[160:], n.xattr.inline)
	return b
}

// stamp is a time as inodes have it: 34 bits of seconds and nanoseconds.
func stamp(t time.Time) (sec, extra uint32) {
	if t.IsZero() {
		return 0, 0
	}
	s := min(max(t.Unix(), -1<<31), 1<<34-1<<31-1)
	epoch := uint32((s-int64(int32(s)))>>32) & 3
	return uint32(s), uint32(t.Nanosecond())<<2 | epoch
}

// device is i_block of a device.
func device(major, minor uint32) (b [60]byte) {
	if major < 256 && minor < 256 {
		binary.LittleEndian.PutUint32(b[0:], major<<8|minor)
	} else {
		binary.LittleEndian.PutUint32(b[4:], minor&0xff|major<<8|minor&^0xff<<12)
	}
	return b
}

// Links is the number of names of a file.
func (n *Inode) Links() int { return n.links }
