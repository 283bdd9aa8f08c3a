package imagefs

import (
	"context"
	"encoding/json"
	"errors"
	"hash/maphash"
	"io"
	"sort"
	"strconv"
	"sync"
	"time"

	"github.com/hugelgupf/p9/linux"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/bytejson"
)

// content is what a file contains.
type content interface {
	io.ReaderAt
	// measure returns the length in bytes and a number that changes when the
	// contents do.
	measure() (size int64, sum uint64)
}

// fixed is content as of one moment.
type fixed struct {
	b   []byte
	sum uint64
}

func (c fixed) measure() (int64, uint64) { return int64(len(c.b)), c.sum }

func (c fixed) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(c.b)) {
		return 0, io.EOF
	}
	n := copy(p, c.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// liveBitmap is a layer's bitmap, as of each read. Bits are only ever set, so
// their number tells whether something has changed.
type liveBitmap struct{ l Layer }

func (c liveBitmap) measure() (int64, uint64) { return c.l.BitmapLen(), uint64(c.l.Allocated()) }

func (c liveBitmap) ReadAt(p []byte, off int64) (int, error) { return c.l.BitmapAt(p, off) }

const (
	// maxSnapshot is the longest map that is held in memory, so that it is as
	// of the moment it was opened.
	maxSnapshot = 1 << 20
	// mapPiece is about how much of a longer map is made at a time.
	mapPiece = 64 << 10
	// maxMarks is how many places an open map remembers.
	maxMarks = 256
	// maxHeld is how many bytes of text all open files of a tree hold together.
	// What is opened beyond that is made as it is read.
	maxHeld = 16 << 20
	// maxWalk is how long a piece of a map may take to make. Images are free to
	// claim any size, and so to ask for any time.
	maxWalk = 2 * time.Second
)

// live is content that is made for each read.
type live struct{ make func() content }

func (c live) measure() (int64, uint64)                      { return c.make().measure() }
func (c live) ReadAt(p []byte, off int64) (n int, err error) { return c.make().ReadAt(p, off) }

// text is a fixed content that any number of open files hold.
type text struct {
	fixed
	key  uint64 // of the state it is of
	refs int
}

// hold returns a text that is the contents of a map whose key is key, or false
// if it is too long or too much is held already. identity.mu is locked.
func (n *node) hold(key uint64, m *extentMap) (*text, bool) {
	if t := n.identity.text; t != nil && t.key == key {
		t.refs++
		return t, true
	}
	s, ok := m.snapshot()
	if !ok || !n.Tree.take(len(s.b)) {
		return nil, false
	}
	t := &text{fixed: s, key: key, refs: 1}
	n.identity.text = t
	return t, true
}

// drop ends what hold began.
func (n *node) drop(t *text) {
	n.identity.mu.Lock()
	defer n.identity.mu.Unlock()
	if t.refs--; t.refs > 0 {
		return
	}
	n.Tree.held.Add(-int64(len(t.b)))
	if n.identity.text == t {
		n.identity.text = nil
	}
}

// take accounts for size bytes that an open file is to hold.
func (t *Tree) take(size int) bool {
	if t.held.Add(int64(size)) > maxHeld {
		t.held.Add(-int64(size))
		return false
	}
	return true
}

// extentMap is a layer's extents as JSON, made as they are read: a list, one
// extent a line. Reading on costs nothing extra; going back costs at most a
// piece, because the places where pieces began are remembered.
type extentMap struct {
	t *Tree
	d *Disk
	l Layer

	mu    sync.Mutex
	end   int64  // size of the disk
	buf   []byte // a piece of the text
	pos   int64  // where in the text it begins
	next  int64  // the first byte of the disk that is in no piece yet
	ended bool   // the piece is the last one
	marks []mark // ascending
	keeps bool   // the piece is accounted for

	file   string // the last extent's file
	quoted []byte // its name as JSON
}

// mark says where in the text the extent that begins at disk is.
type mark struct{ pos, disk int64 }

func newExtentMap(t *Tree, d *Disk, l Layer) *extentMap {
	return &extentMap{t: t, d: d, l: l, end: l.Size(), marks: []mark{{0, 0}}}
}

var errPieceFull = errors.New("imagefs: piece is full")

// fill replaces the piece by the following one.
func (c *extentMap) fill() error {
	c.pos += int64(len(c.buf))
	if last := c.marks[len(c.marks)-1]; c.pos > last.pos {
		if len(c.marks) >= maxMarks { // every other one will do
			for i := range maxMarks / 2 {
				c.marks[i] = c.marks[2*i]
			}
			c.marks = c.marks[:maxMarks/2]
		}
		c.marks = append(c.marks, mark{c.pos, c.next})
	}
	c.buf = c.buf[:0]
	if c.next < c.end {
		ctx, cancel := context.WithTimeout(context.Background(), c.t.maxWalk)
		defer cancel()
		err := c.l.Extents(ctx, c.next, c.end-c.next, func(e cowdisk.Extent) error {
			if len(c.buf) >= mapPiece {
				return errPieceFull
			}
			if c.next == 0 {
				c.buf = append(c.buf, '[')
			} else {
				c.buf = append(c.buf, ",\n"...)
			}
			c.buf = c.append(c.buf, &e)
			if e.Length <= 0 {
				return errors.New("imagefs: an extent of no length")
			}
			c.next = e.Start + e.Length
			return nil
		})
		if errors.Is(err, errPieceFull) {
			return nil
		}
		if errors.Is(err, context.DeadlineExceeded) {
			return linux.EFBIG
		}
		if err != nil {
			return err
		}
	}
	if c.next == 0 { // an empty disk
		c.buf = append(c.buf, '[')
	}
	c.buf = append(c.buf, "]\n"...)
	c.ended = true
	return nil
}

// append appends an extent as encoding/json would write it: a stat(2) of a map
// makes all of it, and the library takes eight times as long.
func (c *extentMap) append(b []byte, e *cowdisk.Extent) []byte {
	b = append(b, `{"start":`...)
	b = strconv.AppendInt(b, e.Start, 10)
	b = append(b, `,"length":`...)
	b = strconv.AppendInt(b, e.Length, 10)
	b = append(b, `,"depth":`...)
	b = strconv.AppendInt(b, int64(e.Depth), 10)
	b = append(b, `,"present":`...)
	b = strconv.AppendBool(b, e.Present)
	b = append(b, `,"zero":`...)
	b = strconv.AppendBool(b, e.Zero)
	b = append(b, `,"data":`...)
	b = strconv.AppendBool(b, e.Data)
	if e.Offset != nil {
		b = append(b, `,"offset":`...)
		b = strconv.AppendInt(b, *e.Offset, 10)
	}
	if e.Filename != "" {
		if e.Filename != c.file || c.quoted == nil {
			c.file = e.Filename
			c.quoted, _ = json.Marshal(bytejson.Encode(c.d.hide(e.Filename))) // a string: it cannot fail
		}
		b = append(b, `,"filename":`...)
		b = append(b, c.quoted...)
	}
	return append(b, '}')
}

// seek makes the piece the one that holds off, if there is one.
func (c *extentMap) seek(off int64) error {
	if off < c.pos || len(c.buf) == 0 {
		i := sort.Search(len(c.marks), func(i int) bool { return c.marks[i].pos > off }) - 1
		c.pos, c.next = c.marks[i].pos, c.marks[i].disk
		c.buf, c.ended = c.buf[:0], false
		if err := c.fill(); err != nil {
			return err
		}
	}
	for off >= c.pos+int64(len(c.buf)) && !c.ended {
		if err := c.fill(); err != nil {
			return err
		}
	}
	return nil
}

func (c *extentMap) ReadAt(p []byte, off int64) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// The piece stays for the next read if there is room for it.
	if !c.keeps {
		c.keeps = c.t.take(2 * mapPiece)
	}
	defer func() {
		if !c.keeps {
			c.buf, c.ended = nil, false
		}
	}()
	n := 0
	for n < len(p) {
		if err := c.seek(off); err != nil {
			return n, err
		}
		if off >= c.pos+int64(len(c.buf)) {
			return n, io.EOF
		}
		m := copy(p[n:], c.buf[off-c.pos:])
		n += m
		off += int64(m)
	}
	return n, nil
}

// close gives back what is accounted for.
func (c *extentMap) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keeps {
		c.t.held.Add(-2 * mapPiece)
	}
	c.keeps, c.buf, c.ended = false, nil, false
}

// measure makes the whole map once, in pieces. What takes longer than maxWalk is
// measured as far as that.
func (c *extentMap) measure() (size int64, sum uint64) {
	var h maphash.Hash
	h.SetSeed(c.t.seed)
	m := newExtentMap(c.t, c.d, c.l)
	for begin := time.Now(); !m.ended && time.Since(begin) < c.t.maxWalk; {
		if err := m.fill(); err != nil {
			break // whoever reads it will be told
		}
		h.Write(m.buf)
	}
	return m.pos + int64(len(m.buf)), h.Sum64()
}

// snapshot is c as of now, if it is short enough.
func (c *extentMap) snapshot() (fixed, bool) {
	b := make([]byte, 0, mapPiece)
	m := newExtentMap(c.t, c.d, c.l)
	for !m.ended {
		if err := m.fill(); err != nil || len(b)+len(m.buf) > maxSnapshot {
			return fixed{}, false
		}
		b = append(b, m.buf...)
	}
	return fixed{b, maphash.Bytes(c.t.seed, b)}, true
}
