package ext4

import (
	"crypto/sha256"
	"fmt"
	"io"
	"time"
)

const (
	blockSize      = 4096
	blocksPerGroup = 8 * blockSize
	groupBytes     = blocksPerGroup * blockSize
	inodeSize      = 256
	inodesPerBlock = blockSize / inodeSize
	descSize       = 32
	maxBlocks      = 1<<32 - 1 // block numbers have 32 bits here
	defaultLimit   = 64 << 30
	firstInode     = 11
	rootInode      = 2
	journalInode   = 8
)

// MinSize is the smallest file system that is made, in bytes.
const MinSize = 16 << 20

// Options say what file system is made.
type Options struct {
	// Size is the file system's size in bytes, rounded down to a block of 4096; 0 = half as much again as its contents, at least MinFree.
	Size int64
	// MinFree is what is free at least when Size is 0, in bytes; 0 = 64 MiB.
	MinFree int64
	// Limit bounds Size when that is 0; 0 = 64 GiB.
	Limit int64
	// MaxInodes bounds the number of files; 0 = 4 million.
	MaxInodes int
	// ID is where UUID and hash seed come from, such as the digest of what is written.
	ID string
	// Label is the volume's name, at most 16 bytes.
	Label string
	// Time is when the file system was made, as it says.
	Time time.Time
	// Punch gives n bytes of the disk back that are not used any more; they may read as anything afterwards. nil = they stay.
	Punch func(off, n int64) error
}

func (o *Options) setDefaults() error {
	if o.MinFree == 0 {
		o.MinFree = 64 << 20
	}
	if o.MaxInodes == 0 {
		o.MaxInodes = 4 << 20
	}
	if o.Limit == 0 {
		o.Limit = defaultLimit
	}
	if o.Size != 0 {
		o.Limit = o.Size
	}
	if o.Limit < MinSize || o.Limit/blockSize > maxBlocks {
		return fmt.Errorf("%w: %d bytes; from %d to %d can be made", ErrSize, o.Limit, MinSize, int64(maxBlocks)*blockSize)
	}
	return nil
}

// Writer makes one file system. It is for one goroutine. After an error of
// the disk or ErrFull it is of no more use.
type Writer struct {
	o         Options
	out       *stream
	root      *Inode
	inodes    int // linked or not, all that take memory
	limit     int64
	next      int64 // the first block that was never allocated
	headLimit int64 // blocks at the begin of a group with a backup: superblock and descriptors of the largest file system allowed
	freed     []extent
	uuid      [16]byte
	seed      [16]byte
	buf       []byte
	finished  bool
}

// New begins a file system on dst, which must read as zeros wherever nothing
// is written. The root folder is there, mode 0755.
//
// Errors: ErrSize.
func New(dst io.WriterAt, o Options) (*Writer, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	w := &Writer{o: o, out: &stream{dst: dst}, limit: o.Limit / blockSize, buf: make([]byte, 256<<10)}
	w.headLimit = 1 + descBlocks(groups(w.limit))
	w.next = w.headLimit
	sum := sha256.Sum256([]byte("moovm ext4\x00" + o.ID))
	w.uuid, w.seed = [16]byte(sum[:16]), [16]byte(sum[16:])
	w.uuid[6], w.uuid[8] = w.uuid[6]&0x0f|0x80, w.uuid[8]&0x3f|0x80 // version 8: made by a rule of one's own
	w.root = &Inode{Attr: Attr{Mode: ModeDir | 0o755, MTime: o.Time}, children: map[string]*Inode{}, links: 1}
	w.inodes = 1
	return w, nil
}

// UUID is the file system's.
func (w *Writer) UUID() [16]byte { return w.uuid }

// Root is the root folder.
func (w *Writer) Root() *Inode { return w.root }

// Used is the number of bytes of the disk that were given to contents so far,
// those that were deleted again included.
func (w *Writer) Used() int64 { return w.next * blockSize }

func groups(blocks int64) int64     { return (blocks + blocksPerGroup - 1) / blocksPerGroup }
func descBlocks(groups int64) int64 { return (groups*descSize + blockSize - 1) / blockSize }

// hasBackup says whether a group begins with a copy of the superblock:
// 0, 1 and the powers of 3, 5 and 7.
func hasBackup(g int64) bool {
	if g <= 1 {
		return true
	}
	for _, p := range []int64{3, 5, 7} {
		n := p
		for n < g {
			n *= p
		}
		if n == g {
			return true
		}
	}
	return false
}

// alloc gives the next blocks, at most n and at least one, in one piece.
func (w *Writer) alloc(n int64) (extent, error) {
	g, in := w.next/blocksPerGroup, w.next%blocksPerGroup
	if in < w.headLimit && hasBackup(g) {
		in = w.headLimit
		w.next = g*blocksPerGroup + in
	}
	// Up to the next group's head, or that group's end: whichever comes first is good enough.
	n = min(n, blocksPerGroup-in, w.limit-w.next)
	if n <= 0 {
		return extent{}, fmt.Errorf("%w: its size is %d bytes; ask for a larger one", ErrFull, w.limit*blockSize)
	}
	e := extent{phys: w.next, n: n}
	w.next += n
	return e, nil
}

// allocWhole gives n blocks, of at most a group less its head, in one piece.
func (w *Writer) allocWhole(n int64) (int64, error) {
	e, err := w.alloc(n)
	if err != nil || e.n == n {
		return e.phys, err
	}
	w.freed = append(w.freed, e)
	e, err = w.alloc(n)
	if err == nil && e.n < n {
		err = fmt.Errorf("%w: its size is %d bytes; ask for a larger one", ErrFull, w.limit*blockSize)
	}
	return e.phys, err
}

// release gives the blocks of a deleted file back.
func (w *Writer) release(es []extent) error {
	w.freed = append(w.freed, es...)
	if w.o.Punch == nil {
		return nil
	}
	if err := w.out.flush(); err != nil {
		return err
	}
	for _, e := range es {
		if err := w.o.Punch(e.phys*blockSize, e.n*blockSize); err != nil {
			return err
		}
	}
	return nil
}

// writeBlock writes one block of at most blockSize bytes.
func (w *Writer) writeBlock(block int64, p []byte) error { return w.out.write(p, block*blockSize) }

// stream makes large writes of small ones that follow each other.
type stream struct {
	dst io.WriterAt
	off int64
	buf []byte
}

const streamBuffer = 1 << 20

func (s *stream) write(p []byte, off int64) error {
	for len(p) > 0 {
		if s.off+int64(len(s.buf)) != off || len(s.buf) == streamBuffer {
			if err := s.flush(); err != nil {
				return err
			}
			s.off = off
		}
		n := min(len(p), streamBuffer-len(s.buf))
		s.buf = append(s.buf, p[:n]...)
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (s *stream) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	_, err := s.dst.WriteAt(s.buf, s.off)
	s.buf = s.buf[:0]
	return err
}
