package cowdisk

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// memFS is a file system in memory that can crash: it remembers which writes were not synced, and crash makes a file system on which any
// subset of them, torn at 512 bytes, has reached the disk. It can also fail or cut short any call.
type memFS struct {
	mu    sync.Mutex
	nodes map[string]*memNode
	next  uint64
	clock int64 // the present, in seconds; 0 = each change takes one

	// after, if not nil, runs after every change of a file: a point to crash at.
	after func()
	// fault, if not nil, may fail a call ("read", "write", "sync", "punch", "truncate", "next", "stat") or cut a write to n bytes.
	fault   func(op string, n int) (int, error)
	noPunch bool
}

type memPage = [4096]byte

// memData is a sparse file whose pages are never changed in place, so that copies are cheap.
type memData struct {
	pages map[int64]*memPage
	size  int64
}

type memOp struct {
	kind byte // w, z (zero a range), t
	off  int64
	n    int64
	data []byte
}

type memNode struct {
	cur, dur memData
	log      []memOp
	mtime    int64
	times    []int64 // before mtime: any of them may be the one on disk
	id       uint64
	readers  int
	writer   bool
}

// stamp makes a node's time the present. Without a clock every change has a second of its own.
func (m *memFS) stamp(n *memNode) {
	n.times = append(n.times, n.mtime)
	if m.clock == 0 {
		n.mtime++
	} else {
		n.mtime = m.clock
	}
}

// wait lets time pass until the next second.
func (m *memFS) wait() {
	if m.clock != 0 {
		m.clock++
	}
}

func newMemFS() *memFS { return &memFS{nodes: map[string]*memNode{}} }

func (d *memData) clone() memData { return memData{maps.Clone(d.pages), d.size} }

func (d *memData) write(p []byte, off int64) {
	for len(p) > 0 {
		i, o := off/4096, off%4096
		n := min(int64(len(p)), 4096-o)
		page := new(memPage)
		if old := d.pages[i]; old != nil && n < 4096 {
			*page = *old
		}
		copy(page[o:], p[:n])
		d.pages[i] = page
		p, off = p[n:], off+n
		d.size = max(d.size, off)
	}
}

// zero keeps the size.
func (d *memData) zero(off, n int64) {
	if n > 1<<24 { // huge: by page
		for i := range d.pages {
			if i*4096 >= off && (i+1)*4096 <= off+n {
				delete(d.pages, i)
			}
		}
		head := min(roundUp(off, 4096)-off, n)
		d.zero(off, head)
		tail := (off + n) % 4096
		d.zero(off+n-tail, tail)
		return
	}
	for n > 0 {
		i, o := off/4096, off%4096
		k := min(n, 4096-o)
		if old := d.pages[i]; old != nil {
			if k == 4096 {
				delete(d.pages, i)
			} else {
				page := *old
				clear(page[o : o+k])
				d.pages[i] = &page
			}
		}
		off, n = off+k, n-k
	}
}

func (d *memData) truncate(size int64) {
	if size < d.size {
		d.zero(size, roundUp(d.size, 4096)-size)
	}
	d.size = size
}

func (d *memData) apply(op memOp) {
	switch op.kind {
	case 'w':
		d.write(op.data, op.off)
	case 'z':
		d.zero(op.off, op.n)
	case 't':
		d.truncate(op.off)
	}
}

func (d *memData) read(p []byte, off int64) int {
	if off >= d.size {
		return 0
	}
	p = p[:min(int64(len(p)), d.size-off)]
	total := len(p)
	for len(p) > 0 {
		i, o := off/4096, off%4096
		n := min(int64(len(p)), 4096-o)
		if page := d.pages[i]; page != nil {
			copy(p[:n], page[o:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
	return total
}

// torn applies a random part of op to d: each 512-byte piece is there or not.
func (d *memData) torn(op memOp, r *rand.Rand) {
	mode := r.IntN(4)
	if mode == 0 {
		return
	}
	if mode == 1 || op.kind == 't' || op.n > 1<<20 {
		d.apply(op)
		return
	}
	for off := op.off; off < op.off+op.n; {
		k := min(512-off%512, op.off+op.n-off)
		if r.IntN(2) == 0 {
			piece := memOp{kind: op.kind, off: off, n: k}
			if op.kind == 'w' {
				piece.data = op.data[off-op.off : off-op.off+k]
			}
			d.apply(piece)
		}
		off += k
	}
}

// crash returns what a machine that lost its power now may find on its disk.
func (m *memFS) crash(r *rand.Rand) *memFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := newMemFS()
	c.next = m.next
	for name, n := range m.nodes {
		k := &memNode{dur: n.dur.clone(), mtime: n.mtime, id: n.id}
		if len(n.times) > 0 && r.IntN(2) == 0 { // times are on disk when the file system likes
			k.mtime = n.times[r.IntN(len(n.times))]
		}
		keepAll := r.IntN(8) == 0
		for _, op := range n.log {
			if keepAll {
				k.dur.apply(op)
			} else {
				k.dur.torn(op, r)
			}
		}
		k.cur = k.dur.clone()
		c.nodes[name] = k
	}
	return c
}

// killed returns what another program finds after this one was killed: everything that was written.
func (m *memFS) killed() *memFS {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := newMemFS()
	c.next = m.next
	for name, n := range m.nodes {
		c.nodes[name] = &memNode{dur: n.cur.clone(), cur: n.cur.clone(), mtime: n.mtime, id: n.id}
	}
	return c
}

// unlock takes the locks of a process that was killed away.
func (m *memFS) unlock() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, n := range m.nodes {
		n.readers, n.writer = 0, false
	}
}

func (m *memFS) put(name string, b []byte, mtime int64) {
	n := m.node(mtime)
	n.cur.write(b, 0)
	n.dur = n.cur.clone()
	m.nodes[name] = n
}

func (m *memFS) node(mtime int64) *memNode {
	m.next++
	return &memNode{cur: memData{pages: map[int64]*memPage{}}, dur: memData{pages: map[int64]*memPage{}}, mtime: mtime, id: m.next}
}

func (m *memFS) contents(name string) []byte {
	n := m.nodes[name]
	b := make([]byte, n.cur.size)
	n.cur.read(b, 0)
	return b
}

func (m *memFS) Resolve(p string) (string, error) {
	if !path.IsAbs(p) {
		p = "/" + p
	}
	return path.Clean(p), nil
}

func (m *memFS) Open(p string, mode OpenMode) (File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.nodes[p]
	if n == nil {
		return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
	}
	return m.open(p, n, mode)
}

func (m *memFS) open(p string, n *memNode, mode OpenMode) (*memFile, error) {
	if !mode.NoLock {
		if n.writer || mode.Write && n.readers > 0 {
			return nil, &Error{Path: p, Kind: ErrLocked}
		}
		if mode.Write {
			n.writer = true
		} else {
			n.readers++
		}
	}
	return &memFile{fs: m, n: n, mode: mode, path: p}, nil
}

func (m *memFS) OpenBeneath(root, rel string, mode OpenMode) (File, error) {
	return m.Open(filepath.Join(root, rel), mode)
}

func (m *memFS) LookBeneath(root, rel string) (target string, dir bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	at := filepath.Join(root, rel)
	if m.nodes[at] != nil {
		return "", false, nil
	}
	for name := range m.nodes {
		if strings.HasPrefix(name, at+"/") {
			return "", true, nil
		}
	}
	return "", false, &fs.PathError{Op: "lstat", Path: at, Err: fs.ErrNotExist}
}

func (m *memFS) Create(p string) (NewFile, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f, err := m.open(p, m.node(1), OpenMode{Write: true})
	return f, err
}

type memFile struct {
	fs     *memFS
	n      *memNode
	mode   OpenMode
	path   string
	closed bool
}

var errMem = errors.New("injected error")

func (f *memFile) enter(op string, n int) (int, error) {
	if f.fs.fault != nil {
		return f.fs.fault(op, n)
	}
	return n, nil
}

func (f *memFile) change(op memOp) {
	f.fs.mu.Lock()
	f.n.cur.apply(op)
	if lo, hi := op.off&^511, (op.off+op.n+511)&^511; op.kind == 'w' && (lo != op.off || hi != op.off+op.n) || op.kind == 'z' && op.n < 1<<24 && (lo != op.off || hi != op.off+op.n) {
		// A disk writes whole sectors: with a part of one goes the rest of it.
		op = memOp{kind: 'w', off: lo, data: make([]byte, max(0, min(hi, f.n.cur.size)-lo))}
		f.n.cur.read(op.data, lo)
		op.n = int64(len(op.data))
	}
	f.n.log = append(f.n.log, op)
	f.fs.stamp(f.n)
	f.fs.mu.Unlock()
	if f.fs.after != nil {
		f.fs.after()
	}
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if _, err := f.enter("read", len(p)); err != nil {
		return 0, err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	n := f.n.cur.read(p, off)
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	n, err := f.enter("write", len(p))
	if n < len(p) { // sectors are whole or not there
		if n = max(0, int((off+int64(n))&^511-off)); n == 0 && err == nil {
			n = min(len(p), int(512-off%512))
		}
	}
	if n > 0 {
		f.change(memOp{'w', off, int64(n), append([]byte(nil), p[:n]...)})
	}
	return n, err
}

func (f *memFile) ReadvAt(bufs [][]byte, off int64) (total int, err error) {
	for _, b := range bufs {
		n, err := f.ReadAt(b, off)
		total, off = total+n, off+int64(n)
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

func (f *memFile) WritevAt(bufs [][]byte, off int64) (int, error) {
	var all []byte
	for _, b := range bufs {
		all = append(all, b...)
	}
	return f.WriteAt(all, off)
}

func (f *memFile) Sync() error {
	if _, err := f.enter("sync", 0); err != nil {
		// As Linux does: what could not be written is forgotten, the next sync knows nothing of it.
		f.fs.mu.Lock()
		f.n.log = f.n.log[:0]
		f.fs.mu.Unlock()
		return err
	}
	f.fs.mu.Lock()
	for _, op := range f.n.log {
		f.n.dur.apply(op)
	}
	f.n.log = f.n.log[:0]
	f.fs.mu.Unlock()
	if f.fs.after != nil {
		f.fs.after()
	}
	return nil
}

func (f *memFile) Truncate(size int64) error {
	if _, err := f.enter("truncate", 0); err != nil {
		return err
	}
	f.change(memOp{kind: 't', off: size})
	return nil
}

func (f *memFile) PunchHole(off, n int64) error {
	if f.fs.noPunch {
		return errors.ErrUnsupported
	}
	if _, err := f.enter("punch", 0); err != nil {
		return err
	}
	f.change(memOp{kind: 'z', off: off, n: n})
	return nil
}

func (f *memFile) ZeroRange(off, n int64) error { return f.PunchHole(off, n) }

func (f *memFile) NextData(off int64) (int64, int64, error) {
	if _, err := f.enter("next", 0); err != nil {
		return 0, 0, err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	first := int64(-1)
	for i := range f.n.cur.pages {
		if (i+1)*4096 > off && (first < 0 || i < first) {
			first = i
		}
	}
	if first < 0 || off >= f.n.cur.size {
		return 0, 0, io.EOF
	}
	end := first
	for f.n.cur.pages[end] != nil {
		end++
	}
	return max(first*4096, off), min(end*4096, f.n.cur.size), nil
}

func (f *memFile) Stat() (FileInfo, error) {
	if _, err := f.enter("stat", 0); err != nil {
		return FileInfo{}, err
	}
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	return FileInfo{Size: f.n.cur.size, ModTime: time.Unix(f.n.mtime, 0), Allocated: int64(len(f.n.cur.pages)) * 4096, ID: FileID{1, f.n.id}}, nil
}

// SyncAll makes the time durable, too.
func (f *memFile) SyncAll() error {
	if err := f.Sync(); err != nil {
		return err
	}
	f.fs.mu.Lock()
	f.n.times = nil
	f.fs.mu.Unlock()
	return nil
}

func (f *memFile) Touch() error {
	f.fs.mu.Lock()
	f.fs.wait()
	f.fs.stamp(f.n)
	f.fs.mu.Unlock()
	if f.fs.after != nil {
		f.fs.after()
	}
	return nil
}

func (f *memFile) Close() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if !f.closed && !f.mode.NoLock {
		if f.mode.Write {
			f.n.writer = false
		} else {
			f.n.readers--
		}
	}
	f.closed = true
	return nil
}

func (f *memFile) Publish(replace, durable bool) error {
	if durable {
		if err := f.Sync(); err != nil {
			return err
		}
	}
	f.fs.mu.Lock()
	if f.fs.nodes[f.path] != nil && !replace {
		f.fs.mu.Unlock()
		return &Error{Path: f.path, Kind: ErrExists}
	}
	f.fs.nodes[f.path] = f.n
	if durable {
		f.n.times = nil // a new inode goes to disk as a whole
	}
	f.fs.mu.Unlock()
	if f.fs.after != nil {
		f.fs.after()
	}
	return nil
}

func (m *memFS) names() string {
	return strings.Join(func() (s []string) {
		for n := range m.nodes {
			s = append(s, n)
		}
		return s
	}(), " ")
}
