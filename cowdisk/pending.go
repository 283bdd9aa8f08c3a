package cowdisk

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// The pending bits of a bitmap, in memory that outlives this process: what a killed server's successor needs to know. A header of 64
// bytes, a summary (one bit per page of the bitmap: some of its words are not zero) and the words of the bitmap, of which only those are
// ever touched that have pending bits. Everything is little-endian, like the bitmap in the file.
//
//	0  magic, stored last; zero = fresh
//	8  the image's device, inode and disk size: another image's bits would be nonsense
//	32 worst failure so far: 1 = of a write, 2 = of a sync
const (
	pendingMagic  = 0x31444e50564f4f4d // "MOOVPND1"
	pendingHeader = 64
)

// pendingBits is the memory shared by SharePending. Guarded by bitmap.mu.
type pendingBits struct {
	mem     []byte // all of it
	summary []byte
	words   []byte
}

// pendingLayout says how long the summary is for a disk of size bytes, where the words begin and where they end.
func pendingLayout(size int64) (summary, words, end int64) {
	pages := (size + pageSectors*sectorSize - 1) / (pageSectors * sectorSize)
	summary = roundUp(pages, 64) / 8
	words = roundUp(pendingHeader+summary, pageBytes)
	return summary, words, words + pages*pageBytes
}

func newPendingBits(mem []byte, size int64) *pendingBits {
	summary, words, end := pendingLayout(size)
	return &pendingBits{mem: mem[:end:end], summary: mem[pendingHeader:][:summary], words: mem[words:end]}
}

// word is word i of page index.
func (p *pendingBits) word(index int64, i int) uint64 {
	return binary.LittleEndian.Uint64(p.words[index*pageBytes+int64(i)*8:])
}

func (p *pendingBits) setWord(index int64, i int, w uint64) {
	binary.LittleEndian.PutUint64(p.words[index*pageBytes+int64(i)*8:], w)
}

// add marks bits as pending; the summary comes first, so that no moment of death finds words that it does not tell of.
func (p *pendingBits) add(index int64, i int, mask uint64) {
	p.summary[index/8] |= 1 << (index % 8)
	p.setWord(index, i, p.word(index, i)|mask)
}

// remove forgets bits that are durable. Pages without other pending bits leave the summary.
func (p *pendingBits) remove(index int64, lo int, words []byte, more bool) {
	for i := lo; len(words) > 0; i, words = i+1, words[8:] {
		p.setWord(index, i, p.word(index, i)&^binary.LittleEndian.Uint64(words))
	}
	if !more {
		p.summary[index/8] &^= 1 << (index % 8)
	}
}

// drop forgets n bits from sector on.
func (p *pendingBits) drop(sector, n int64) {
	for n > 0 {
		index, i, bit := sector/pageSectors, int(sector%pageSectors/64), sector%64
		k := min(n, 64-bit)
		p.setWord(index, i, p.word(index, i)&^(below(k)<<bit))
		sector, n = sector+k, n-k
	}
}

// pages calls f with each page that the summary names. Only the summary is read: touching the words would fill a sparse memory.
func (p *pendingBits) pages(f func(index int64) error) error {
	for off := 0; off < len(p.summary); off += 8 {
		for s := binary.LittleEndian.Uint64(p.summary[off:]); s != 0; s &= s - 1 {
			index := int64(off)*8 + int64(bits.TrailingZeros64(s))
			if (index+1)*pageBytes > int64(len(p.words)) {
				return fmt.Errorf("bitmap page %d", index)
			}
			if err := f(index); err != nil {
				return err
			}
		}
	}
	return nil
}

// fail remembers that a write or a sync failed: the successor's flushes must report it, too.
func (p *pendingBits) fail(sync bool) {
	f := uint64(1)
	if sync {
		f = 2
	}
	if f > binary.LittleEndian.Uint64(p.mem[32:]) {
		binary.LittleEndian.PutUint64(p.mem[32:], f)
	}
}

// pendingOwner is what tells images apart.
func pendingOwner(l *layer) [3]uint64 {
	return [3]uint64{l.id.Device, l.id.Inode, uint64(l.size)}
}

// stamp makes mem this image's.
func (p *pendingBits) stamp(l *layer) {
	le := binary.LittleEndian
	le.PutUint64(p.mem, 0)
	for i, v := range pendingOwner(l) {
		le.PutUint64(p.mem[8+8*i:], v)
	}
	le.PutUint64(p.mem, pendingMagic)
}

// claim makes mem this image's. It reports whether mem had been this image's before, and which failure its last owner left.
func (p *pendingBits) claim(l *layer) (used bool, failed uint64, err error) {
	le := binary.LittleEndian
	switch le.Uint64(p.mem) {
	case 0:
		p.stamp(l)
		return false, 0, nil
	case pendingMagic:
		for i, v := range pendingOwner(l) {
			if le.Uint64(p.mem[8+8*i:]) != v {
				return false, 0, &Error{Path: l.path, Kind: ErrPending, Detail: "they belong to another image", Remedy: "serve the image that was served before, or restart the guest"}
			}
		}
		return true, le.Uint64(p.mem[32:]), nil
	}
	return false, 0, &Error{Path: l.path, Kind: ErrPending, Detail: "the shared memory holds something else", Remedy: "restart the guest"}
}

// PendingLen is the number of bytes that [Disk.SharePending] needs: about one per 4 KiB of disk, nearly all of which stay untouched. It is
// 0 for a disk that has no pending bits: one opened read-only, or a raw one.
func (d *Disk) PendingLen() int64 {
	top := d.chain.layers[0]
	if d.readOnly || top.bm == nil {
		return 0
	}
	_, _, end := pendingLayout(d.size)
	return end
}

// SharePending keeps the bits that wait for a flush in mem as well, so that no completed write is lost when this process is killed: mem is
// shared memory that somebody else holds, such as the in-flight region of a vhost-user front-end, of at least PendingLen bytes, all zero
// when it is fresh. A mem that an earlier process used is taken over: its bits are pending again, and the next flush makes them durable.
// From then on a pending bit is in mem before the write that made it completes, and leaves it when it is durable. After a power failure
// mem is gone, which is what a disk may do with writes that were not flushed.
//
// Memory that is not touched stays untouched: sharing sparse memory costs no more than the pages with pending bits. mem is not trusted:
// bits beyond the end of the disk or of the file, and bits of another image, are refused with ErrPending, and others can spoil only what
// this disk contains.
//
// Requests wait meanwhile. With nil, or when an error is returned, the disk does not use any such memory any more, and it may be unmapped;
// so it may after Close. A disk without a bitmap, or opened read-only, has nothing to share and ignores mem.
func (d *Disk) SharePending(mem []byte) error {
	if !d.gate.pause() {
		return d.errClosed()
	}
	defer d.gate.resume()
	top := d.chain.layers[0]
	if d.readOnly || top.bm == nil {
		return nil
	}
	err := d.flush.run(d.flushPass) // what is pending now is in no memory, or in the old one
	top.bm.sharePending(nil)
	if err != nil || mem == nil {
		return err
	}
	if n := d.PendingLen(); int64(len(mem)) < n {
		return &Error{Path: d.path, Kind: ErrPending, Detail: fmt.Sprintf("%d bytes of shared memory, %d are needed", len(mem), n)}
	}
	p := newPendingBits(mem, d.size)
	used, failed, err := p.claim(top)
	if err != nil || !used {
		if err == nil {
			top.bm.sharePending(p)
		}
		return err
	}
	if err := d.adopt(top, p); err != nil {
		top.bm.sharePending(nil)
		return err
	}
	d.written.Store(true) // what the other process overwrote may not be durable either
	if failed != 0 {
		d.fail(fmt.Errorf("a write or sync failed in the process that served the image before"), failed != 1)
	}
	return nil
}

// shared says whether what is pending is in somebody's memory.
func (b *bitmap) shared() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.pending != nil
}

// movePending makes the memory, in which nothing is pending, the one of a new top layer.
func (b *bitmap) movePending(l *layer) {
	b.mu.Lock()
	p := b.pending
	b.pending = nil
	b.mu.Unlock()
	if p == nil {
		return
	}
	p.stamp(l)
	l.bm.sharePending(p)
}

// adopt makes the bits in p pending, unless the file has them. Nothing is changed before all of them have been looked at.
func (d *Disk) adopt(top *layer, p *pendingBits) error {
	st, err := top.file.Stat()
	if err != nil {
		return err
	}
	// A write completes only when its data is in the file, so no sector lies beyond the file's end.
	limit := min(top.bm.sectors(), d.size/sectorSize, (st.Size-top.data)/sectorSize)
	err = p.pages(func(index int64) error {
		for i := range pageWords {
			if p.word(index, i)&^below(limit-index*pageSectors-int64(i)*64) != 0 {
				return fmt.Errorf("sector %d", index*pageSectors+int64(i)*64)
			}
		}
		return nil
	})
	if err != nil {
		return &Error{Path: d.path, Kind: ErrPending, Detail: "beyond the end of the disk or of the image's file", Err: err, Remedy: "restart the guest"}
	}
	top.bm.sharePending(p)
	return p.pages(func(index int64) error {
		for i := range pageWords {
			s := index*pageSectors + int64(i)*64
			// Again within the limit: whoever shares this memory may have changed it.
			for w := p.word(index, i) & below(limit-s); w != 0; {
				at := int64(bits.TrailingZeros64(w))
				n := int64(bits.TrailingZeros64(^(w >> at)))
				if err := top.bm.adopt(s+at, n); err != nil {
					return err
				}
				w &^= below(at + n)
			}
		}
		if top.bm.dirtyPages() > top.bm.limit/2 {
			return d.flush.run(d.flushPass)
		}
		return nil
	})
}

// below is a word with the lowest n bits set; n may be any number.
func below(n int64) uint64 {
	switch {
	case n <= 0:
		return 0
	case n >= 64:
		return ^uint64(0)
	}
	return 1<<n - 1
}
