package cowdisk

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
)

// The bitmap in memory: pages of 4 KiB (16 MiB of disk each) in folders of 512 pages (8 GiB of disk). Pages come from the file when they
// are first needed; a stretch that is a hole in the file costs one shared empty page. Lookups take no lock. Every change to what the
// tables point to, and every new bit, is made under mu, so a lookup sees old or new.
const (
	pageBytes   = 4096
	pageWords   = pageBytes / 8
	pageSectors = pageBytes * 8
	dirPages    = 512
	dirSectors  = dirPages * pageSectors
)

type bitmapPage struct {
	words [pageWords]uint64 // bit i%64 of word i/64, accessed atomically; little-endian in the file

	// Below: under bitmap.mu.
	index    int64
	dirty    bool // has bits that are not on disk; is in bitmap.dirty
	writing  bool // is part of a running flush
	lo, hi   int  // dirty words: [lo, hi)
	resident bool
}

type stagedWords struct {
	page   *bitmapPage
	lo, hi int
}

type bitmapDir struct {
	pages [dirPages]atomic.Pointer[bitmapPage]
}

// emptyPage and fullPage stand for every page of only zeros or only ones; emptyDir for 8 GiB of nothing. Never written to.
var (
	emptyPage = &bitmapPage{}
	fullPage  = newFullPage()
	emptyDir  = newEmptyDir()
)

func newFullPage() *bitmapPage {
	p := &bitmapPage{}
	for i := range p.words {
		p.words[i] = ^uint64(0)
	}
	return p
}

func newEmptyDir() *bitmapDir {
	d := &bitmapDir{}
	for i := range d.pages {
		d.pages[i].Store(emptyPage)
	}
	return d
}

type bitmap struct {
	dirs   []atomic.Pointer[bitmapDir]
	file   File
	path   string
	offset int64 // in the file
	bytes  int64
	limit  int // resident pages to keep at most

	loadMu sync.Mutex // one loader at a time; held over I/O

	mu       sync.Mutex
	resident []*bitmapPage // pages with memory of their own, a ring for eviction
	hand     int
	dirty    []*bitmapPage
	staged   []stagedWords // of the running flush
	buf      []byte        // of the running flush
	pending  *pendingBits  // copy of the bits that are not on disk, for a successor; nil = nobody wants to know
}

func newBitmap(f File, path string, h *Header, memory int64) *bitmap {
	if memory <= 0 {
		memory = 64 << 20
	}
	b := &bitmap{file: f, path: path, offset: h.BitmapOffset(), bytes: h.BitmapBytes()}
	b.limit = int(max(memory/(pageBytes+64), 16))
	b.dirs = make([]atomic.Pointer[bitmapDir], (h.Sectors()+dirSectors-1)/dirSectors)
	return b
}

// sectors is how many sectors have a bit.
func (b *bitmap) sectors() int64 { return b.bytes * 8 }

// page returns the page at index, loading it if need be.
func (b *bitmap) page(index int64) (*bitmapPage, error) {
	if d := b.dirs[index/dirPages].Load(); d != nil {
		if p := d.pages[index%dirPages].Load(); p != nil {
			return p, nil
		}
	}
	return b.load(index)
}

// load reads a page. Nobody can set bits in a page that is not there, and a page is only dropped when the file has all its bits, so what
// the file says is the truth.
func (b *bitmap) load(index int64) (*bitmapPage, error) {
	b.loadMu.Lock()
	defer b.loadMu.Unlock()
	slot := &b.dirs[index/dirPages]
	d := slot.Load()
	if d == nil {
		empty, err := b.hole(index/dirPages*dirPages*pageBytes, dirPages*pageBytes)
		if err != nil {
			return nil, err
		}
		if empty {
			slot.Store(emptyDir)
			return emptyPage, nil
		}
		d = &bitmapDir{}
		slot.Store(d)
	}
	if p := d.pages[index%dirPages].Load(); p != nil {
		return p, nil
	}
	p, err := b.read(index)
	if err != nil {
		return nil, err
	}
	b.mu.Lock()
	if p != emptyPage && p != fullPage {
		b.admit(p)
	}
	d.pages[index%dirPages].Store(p)
	b.mu.Unlock()
	return p, nil
}

// hole reports whether the file has only a hole in n bitmap bytes at off. The first page of a header layout that is not aligned shares its
// block with the header; then it is simply read.
func (b *bitmap) hole(off, n int64) (bool, error) {
	n = min(n, b.bytes-off)
	if n <= 0 {
		return true, nil
	}
	start, _, err := b.file.NextData(b.offset + off)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("%s: looking for holes in the bitmap: %w", b.path, err)
	}
	return start >= b.offset+off+n, nil
}

func (b *bitmap) read(index int64) (*bitmapPage, error) {
	n := max(min(pageBytes, b.bytes-index*pageBytes), 0)
	raw := getBuf()
	defer putBuf(raw)
	clear(raw[:pageBytes])
	// A bitmap that cannot be read is an error, never "not allocated": that would show stale data.
	if err := readFull(b.file, raw[:n], b.offset+index*pageBytes); err != nil {
		return nil, fmt.Errorf("%s: reading the bitmap: %w", b.path, err)
	}
	var or uint64
	and := ^uint64(0)
	p := &bitmapPage{index: index}
	for i := range p.words {
		w := binary.LittleEndian.Uint64(raw[i*8:])
		p.words[i] = w
		or |= w
		and &= w
	}
	switch {
	case or == 0:
		return emptyPage, nil
	case and == ^uint64(0):
		return fullPage, nil
	}
	return p, nil
}

// admit makes room for and remembers a page with memory of its own. mu is held.
func (b *bitmap) admit(p *bitmapPage) {
	p.resident = true
	for tries := 0; len(b.resident) >= b.limit && tries < len(b.resident); tries++ {
		b.hand %= len(b.resident)
		v := b.resident[b.hand]
		if v.dirty || v.writing {
			b.hand++
			continue
		}
		if v.resident {
			b.drop(v, nil)
		}
		b.resident[b.hand] = p
		b.hand++
		return
	}
	b.resident = append(b.resident, p)
}

// drop takes a clean page out of the table; replacement is nil (load again when needed) or a shared page. mu is held.
func (b *bitmap) drop(p *bitmapPage, replacement *bitmapPage) {
	p.resident = false
	b.dirs[p.index/dirPages].Load().pages[p.index%dirPages].Store(replacement)
}

// What peek finds.
const (
	unknown = iota
	allPresent
	nonePresent
)

// peek says whether all or none of the sectors of [off, off+n) are allocated, if that can be seen in one word that is in memory.
func (b *bitmap) peek(off, n int64) int {
	sector := off / sectorSize
	d := b.dirs[sector/dirSectors].Load()
	if d == nil {
		return unknown
	}
	p := d.pages[sector/pageSectors%dirPages].Load()
	bit := sector % 64
	k := (off+n-1)/sectorSize - sector + 1
	if p == nil || bit+k > 64 {
		return unknown
	}
	switch mask := ^uint64(0) >> (64 - k) << bit; atomic.LoadUint64(&p.words[sector%pageSectors/64]) & mask {
	case mask:
		return allPresent
	case 0:
		return nonePresent
	}
	return unknown
}

// run says whether sector is allocated and how many sectors from it on, at most n, are alike.
func (b *bitmap) run(sector, n int64) (allocated bool, length int64, err error) {
	index := sector / pageSectors
	p, err := b.page(index)
	if err != nil {
		return false, 0, err
	}
	bit := sector % pageSectors
	w := atomic.LoadUint64(&p.words[bit/64]) >> (bit % 64)
	allocated = w&1 != 0
	if allocated {
		w = ^w
	}
	// w: from here on, 0 = alike. The bits shifted in are alike, or unlike but then cut off by left.
	left := 64 - bit%64
	if n <= left {
		if w == 0 {
			return allocated, n, nil
		}
		return allocated, min(n, int64(bits.TrailingZeros64(w))), nil
	}
	if t := int64(bits.TrailingZeros64(w)); t < left {
		return allocated, t, nil
	}
	length, err = b.runOn(allocated, sector+left, n-left)
	return allocated, left + length, err
}

// runOn counts sectors that are alike from sector, which is the first of its word.
func (b *bitmap) runOn(allocated bool, sector, n int64) (length int64, err error) {
	var flip uint64
	if allocated {
		flip = ^uint64(0)
	}
	for length < n {
		s := sector + length
		if !allocated && s%dirSectors == 0 && b.dirs[s/dirSectors].Load() == emptyDir {
			length += dirSectors
			continue
		}
		p, err := b.page(s / pageSectors)
		if err != nil {
			return 0, err
		}
		first := s % pageSectors / 64
		if first == 0 && (p == emptyPage && !allocated || p == fullPage && allocated) {
			length += pageSectors
			continue
		}
		for i := first; i < pageWords && length < n; i++ {
			if w := atomic.LoadUint64(&p.words[i]) ^ flip; w != 0 {
				return min(n, length+int64(bits.TrailingZeros64(w))), nil
			}
			length += 64
		}
	}
	return n, nil
}

// all reports whether all n sectors from sector on are allocated.
func (b *bitmap) all(sector, n int64) (bool, error) {
	a, l, err := b.run(sector, n)
	return a && l == n, err
}

// set allocates n sectors. The data they cover has been written; Flush will see to it that it is on disk before the bits are.
func (b *bitmap) set(sector, n int64) error {
	if sector < 0 || n < 0 || sector+n > b.sectors() {
		return ErrNoBit
	}
	for n > 0 {
		index := sector / pageSectors
		p, err := b.page(index) // outside mu, this may read
		if err != nil {
			return err
		}
		bit := sector % pageSectors
		k := min(n, pageSectors-bit)
		if p == fullPage {
			sector, n = sector+k, n-k
			continue
		}
		b.mu.Lock()
		if p = b.own(index); p != nil {
			b.mark(p, bit, k)
			sector, n = sector+k, n-k
		} // else it was evicted in between: again
		b.mu.Unlock()
	}
	return nil
}

// own returns a page that may be written to, nil when it is not in memory. mu is held.
func (b *bitmap) own(index int64) *bitmapPage {
	slot := &b.dirs[index/dirPages]
	d := slot.Load()
	if d == emptyDir {
		d = newEmptyDir()
		slot.Store(d)
	}
	p := d.pages[index%dirPages].Load()
	if p == emptyPage || p == fullPage {
		c := &bitmapPage{index: index}
		if p == fullPage {
			c.words = fullPage.words
		}
		b.admit(c)
		d.pages[index%dirPages].Store(c)
		p = c
	}
	return p
}

// mark sets bits [bit, bit+n) of p and remembers which words are new. mu is held.
func (b *bitmap) mark(p *bitmapPage, bit, n int64) {
	for n > 0 {
		i, s := bit/64, bit%64
		k := min(n, 64-s)
		mask := (^uint64(0) >> (64 - k)) << s
		if old := p.words[i]; old&mask != mask { // only written under mu
			if b.pending != nil { // first, as a writer that sees the bit takes the sector for allocated
				b.pending.add(p.index, int(i), mask&^old)
			}
			atomic.StoreUint64(&p.words[i], old|mask)
			if !p.dirty {
				p.dirty, p.lo, p.hi = true, int(i), int(i)+1
				b.dirty = append(b.dirty, p)
			}
			p.lo, p.hi = min(p.lo, int(i)), max(p.hi, int(i)+1)
		}
		bit, n = bit+k, n-k
	}
}

// adopt marks n sectors that another process wrote. Those that the file has are pending no more.
func (b *bitmap) adopt(sector, n int64) error {
	for n > 0 {
		allocated, k, err := b.run(sector, n)
		if err != nil {
			return err
		}
		if allocated {
			b.mu.Lock()
			b.pending.drop(sector, k)
			b.mu.Unlock()
		} else if err := b.set(sector, k); err != nil {
			return err
		}
		sector, n = sector+k, n-k
	}
	return nil
}

// sharePending says where pending bits are to be copied. There are none at this moment.
func (b *bitmap) sharePending(p *pendingBits) {
	b.mu.Lock()
	b.pending = p
	b.mu.Unlock()
}

// failed tells a successor of a failure.
func (b *bitmap) failed(sync bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.pending != nil {
		b.pending.fail(sync)
	}
}

// dirtyPages is how many pages wait for a flush.
func (b *bitmap) dirtyPages() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.dirty)
}

// A flush of the bitmap is two steps around the data sync: stage copies the new bits aside, write puts the copy on disk. Bits that are set
// in between wait for the next flush: their data may not have been synced.

// stage copies all dirty words and reports whether there are any. Only one flush runs at a time.
func (b *bitmap) stage() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.dirty) == 0 {
		return false
	}
	slices.SortFunc(b.dirty, func(x, y *bitmapPage) int { return cmp.Compare(x.index, y.index) })
	b.buf, b.staged = b.buf[:0], b.staged[:0]
	for _, p := range b.dirty {
		b.staged = append(b.staged, stagedWords{p, p.lo, p.hi})
		for _, w := range p.words[p.lo:p.hi] { // only written under mu
			b.buf = binary.LittleEndian.AppendUint64(b.buf, w)
		}
		p.dirty, p.writing = false, true
	}
	clear(b.dirty)
	b.dirty = b.dirty[:0]
	return true
}

// write puts what was staged on disk, neighbouring words in one go.
func (b *bitmap) write() error {
	buf := b.buf
	for i := 0; i < len(b.staged); {
		off := b.staged[i].page.index*pageBytes + int64(b.staged[i].lo)*8
		n := (b.staged[i].hi - b.staged[i].lo) * 8
		for i++; i < len(b.staged); i++ {
			s := b.staged[i]
			if off+int64(n) != s.page.index*pageBytes+int64(s.lo)*8 {
				break
			}
			n += (s.hi - s.lo) * 8
		}
		// The last word may reach beyond the bitmap; there are no bits in that part.
		if err := writeFull(b.file, buf[:min(int64(n), b.bytes-off)], b.offset+off); err != nil {
			return err
		}
		buf = buf[n:]
	}
	return nil
}

// unstage ends the flush. When it failed the pages stay in memory for good: they know what the file does not.
func (b *bitmap) unstage(ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	buf := b.buf
	for _, s := range b.staged {
		if !ok {
			continue
		}
		p := s.page
		p.writing = false
		if n := (s.hi - s.lo) * 8; b.pending != nil {
			b.pending.remove(p.index, s.lo, buf[:n], p.dirty)
			buf = buf[n:]
		}
		if !p.dirty && p.full() {
			b.drop(p, fullPage)
		}
	}
	clear(b.staged)
	b.staged = b.staged[:0]
	if cap(b.buf) > 1<<20 {
		b.buf = nil
	}
}

func (p *bitmapPage) full() bool {
	for _, w := range p.words {
		if w != ^uint64(0) {
			return false
		}
	}
	return true
}

// count is the number of allocated sectors among the first n.
func (b *bitmap) count(n int64) (int64, error) {
	n = min(n, b.sectors())
	var c int64
	for s := int64(0); s < n; {
		if s%dirSectors == 0 && b.dirs[s/dirSectors].Load() == emptyDir {
			s += dirSectors
			continue
		}
		p, err := b.page(s / pageSectors)
		if err != nil {
			return c, err
		}
		k := min(pageSectors, n-s)
		switch p {
		case emptyPage:
		case fullPage:
			c += k
		default:
			for i := int64(0); i < k; i += 64 {
				w := atomic.LoadUint64(&p.words[i/64])
				if k-i < 64 {
					w &= ^uint64(0) >> (64 - (k - i))
				}
				c += int64(bits.OnesCount64(w))
			}
		}
		s += pageSectors
	}
	return c, nil
}

// readAt copies the live bitmap as the file would have it after a flush.
func (b *bitmap) readAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= b.bytes {
		return 0, io.EOF
	}
	n := 0
	for n < len(p) && off < b.bytes {
		page, err := b.page(off / pageBytes)
		if err != nil {
			return n, err
		}
		o := off % pageBytes
		k := int(min(pageBytes-o, b.bytes-off, int64(len(p)-n)))
		for i := range k {
			j := o + int64(i)
			p[n+i] = byte(atomic.LoadUint64(&page.words[j/8]) >> (j % 8 * 8))
		}
		n, off = n+k, off+int64(k)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
