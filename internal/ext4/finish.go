package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
)

const (
	compatJournal, compatXattr, compatIndex                            = 0x4, 0x8, 0x20
	incompatFiletype, incompatExtents, incompatFlexBG                  = 0x2, 0x40, 0x200
	roSparse, roLarge, roHuge, roGroupSum, roManyFolders, roExtraIsize = 0x1, 0x2, 0x8, 0x10, 0x20, 0x40
	groupInodesUnused, groupInodesZeroed                               = 0x1, 0x4
	compatFeatures                                                     = compatJournal | compatXattr | compatIndex
	incompatFeatures                                                   = incompatFiletype | incompatExtents | incompatFlexBG
	roFeatures                                                         = roSparse | roLarge | roHuge | roGroupSum | roManyFolders | roExtraIsize
	minInodesPerGroup, maxInodesPerGroup                               = 8192, 8 * blockSize
)

// plan is what the groups look like in the end.
type plan struct {
	blocks, groups                     int64
	inodesPerGroup                     int64
	blockBitmaps, inodeBitmaps, tables []int64 // where they are, a group
	head                               int64   // blocks that were kept free for a backup
	end                                int64   // behind all that is in use
	freed                              []extent
	used                               int64 // inodes, the reserved ones included
	folders                            []int64
	descBlocks                         int64
}

// Finish writes everything but the contents, which are on the disk already,
// and returns the size of the file system: the disk is to be made that long.
//
// Errors: ErrFull, ErrInodes, those of the disk.
func (w *Writer) Finish() (int64, error) {
	if w.finished {
		return 0, errors.New("ext4: Finish was called before")
	}
	w.finished = true
	list := w.number()
	journal := &Inode{Attr: Attr{Mode: ModeFile | 0o600, MTime: w.o.Time}, links: 1, num: journalInode}
	if err := w.layoutJournal(journal); err != nil {
		return 0, err
	}
	for _, n := range list {
		if err := w.layout(n.inode, n.parent); err != nil {
			return 0, err
		}
	}
	inodes := make([]*Inode, 0, len(list)+1)
	inodes = append(inodes, list[0].inode, journal)
	for _, n := range list[1:] {
		inodes = append(inodes, n.inode)
	}
	p, err := w.plan(int64(len(list)-1) + firstInode - 1)
	if err != nil {
		return 0, err
	}
	if err := w.writeInodes(p, inodes); err != nil {
		return 0, err
	}
	if err := w.writeGroups(p, journal); err != nil {
		return 0, err
	}
	if err := w.out.flush(); err != nil {
		return 0, err
	}
	return p.blocks * blockSize, nil
}

type numbered struct {
	inode  *Inode
	parent uint32
}

// number gives every inode with a name its number, folder by folder, in the
// order of their names: what is near in the tree is near on the disk.
func (w *Writer) number() []numbered {
	w.root.num, w.root.placed = rootInode, true
	list := []numbered{{w.root, rootInode}}
	next := uint32(firstInode)
	for i := 0; i < len(list); i++ {
		n := list[i].inode
		for _, name := range n.Names() {
			c := n.children[name]
			if c.placed {
				continue
			}
			c.placed, c.num = true, next
			next++
			list = append(list, numbered{c, n.num})
		}
	}
	return list
}

func (w *Writer) layout(n *Inode, parent uint32) error {
	if n.xattr.block != nil {
		e, err := w.alloc(1)
		if err != nil {
			return err
		}
		n.xattr.at = e.phys
		n.blocks++
		if err := w.writeBlock(e.phys, n.xattr.block); err != nil {
			return err
		}
	}
	switch n.Mode & ModeType {
	case ModeFile:
		return w.layoutExtents(n)
	case ModeDir:
		blocks, index := w.dirBlocks(n, parent)
		n.index = index
		return w.layoutBlocks(n, blocks, int64(len(blocks))*blockSize)
	case ModeSymlink:
		n.size = int64(len(n.Target))
		if len(n.Target) < len(n.block) {
			copy(n.block[:], n.Target)
			return nil
		}
		b := make([]byte, blockSize)
		copy(b, n.Target)
		return w.layoutBlocks(n, [][]byte{b}, n.size)
	case ModeBlock, ModeChar:
		n.block = device(n.Major, n.Minor)
	}
	return nil
}

// layoutBlocks writes the contents of something that has only whole blocks.
func (w *Writer) layoutBlocks(n *Inode, blocks [][]byte, size int64) error {
	n.size, n.extents = size, nil
	for i := 0; i < len(blocks); {
		e, err := w.alloc(int64(len(blocks) - i))
		if err != nil {
			return err
		}
		e.logical = int64(i)
		n.extents = addExtent(n.extents, e)
		for k := range e.n {
			if err := w.writeBlock(e.phys+k, blocks[i]); err != nil {
				return err
			}
			i++
		}
	}
	return w.layoutExtents(n)
}

// layoutJournal makes an empty journal: its superblock, and room that reads
// as zeros because nothing was ever written there.
func (w *Writer) layoutJournal(n *Inode) error {
	want := int64(8192)
	if w.o.Size != 0 && w.limit < 4*want {
		want = 1024 // the least that Linux takes
	}
	for got := int64(0); got < want; {
		e, err := w.alloc(want - got)
		if err != nil {
			return err
		}
		e.logical = got
		n.extents = addExtent(n.extents, e)
		got += e.n
	}
	n.size = want * blockSize
	b := make([]byte, blockSize)
	be := binary.BigEndian
	for _, f := range []struct{ at, v int }{{0, 0xc03b3998}, {4, 4}, {12, blockSize}, {16, int(want)}, {20, 1}, {24, 1}, {64, 1}} {
		be.PutUint32(b[f.at:], uint32(f.v))
	}
	if err := w.writeBlock(n.extents[0].phys, b); err != nil {
		return err
	}
	return w.layoutExtents(n)
}

// plan decides on the size, and gives the groups their bitmaps and tables.
func (w *Writer) plan(used int64) (*plan, error) {
	size := w.limit
	if w.o.Size == 0 {
		free := max(w.next/2, w.o.MinFree/blockSize)
		size = min(w.next+free, w.limit)
	}
	for {
		p := &plan{blocks: size, used: used, head: w.headLimit}
		p.blocks, p.groups = trim(size)
		// An inode for 16 KiB, as mke2fs has it, or a quarter more than are in use.
		p.inodesPerGroup = max(minInodesPerGroup, (used*5/4/p.groups+8)&^7)
		p.inodesPerGroup = (p.inodesPerGroup + inodesPerBlock - 1) / inodesPerBlock * inodesPerBlock
		if p.inodesPerGroup > maxInodesPerGroup && size < w.limit {
			size = min(size+blocksPerGroup, w.limit)
			continue
		}
		p.inodesPerGroup = min(p.inodesPerGroup, maxInodesPerGroup)
		if used > p.inodesPerGroup*p.groups {
			return nil, fmt.Errorf("%w: %d in a file system of %d bytes; ask for a larger one", ErrInodes, used, p.blocks*blockSize)
		}
		at, freed := w.next, len(w.freed)
		if err := w.placeGroups(p); err != nil {
			return nil, err
		}
		if size == w.limit || p.blocks-p.end >= w.o.MinFree/blockSize/2 {
			p.end = w.next
			p.freed = w.freed
			if p.end > p.blocks {
				return nil, fmt.Errorf("%w: its size is %d bytes; ask for a larger one", ErrFull, w.limit*blockSize)
			}
			return p, nil
		}
		size = min(size+max(w.o.MinFree/blockSize, p.end-p.blocks), w.limit)
		w.next, w.freed = at, w.freed[:freed]
	}
}

// trim is the number of blocks and groups of a file system: a last group that
// has hardly room for its head is left out.
func trim(blocks int64) (int64, int64) {
	if tail := blocks % blocksPerGroup; tail < 4096 && blocks > blocksPerGroup {
		blocks -= tail
	}
	return blocks, groups(blocks)
}

func (w *Writer) placeGroups(p *plan) error {
	p.descBlocks = descBlocks(p.groups)
	var err error
	// One bitmap after the other; those of many groups do not fit into one piece.
	place := func() ([]int64, error) {
		var at []int64
		for int64(len(at)) < p.groups {
			e, err := w.alloc(p.groups - int64(len(at)))
			if err != nil {
				return nil, err
			}
			for k := range e.n {
				at = append(at, e.phys+k)
			}
		}
		return at, nil
	}
	if p.blockBitmaps, err = place(); err != nil {
		return err
	}
	if p.inodeBitmaps, err = place(); err != nil {
		return err
	}
	for range p.groups {
		at, err := w.allocWhole(p.inodesPerGroup / inodesPerBlock)
		if err != nil {
			return err
		}
		p.tables = append(p.tables, at)
	}
	p.end = w.next
	return nil
}

func (w *Writer) writeInodes(p *plan, inodes []*Inode) error {
	p.folders = make([]int64, p.groups)
	for _, n := range inodes {
		i := int64(n.num - 1)
		g, k := i/p.inodesPerGroup, i%p.inodesPerGroup
		if n.Dir() {
			p.folders[g]++
		}
		if err := w.out.write(n.bytes(), p.tables[g]*blockSize+k*inodeSize); err != nil {
			return err
		}
	}
	return nil
}

// writeGroups writes bitmaps, descriptors and superblocks.
func (w *Writer) writeGroups(p *plan, journal *Inode) error {
	slices.SortFunc(p.freed, func(a, b extent) int { return int(a.phys - b.phys) })
	desc := make([]byte, p.descBlocks*blockSize)
	le := binary.LittleEndian
	var freeBlocks, freeInodes int64
	freed := p.freed
	for g := range p.groups {
		bitmap, free, rest := p.blockBitmap(g, freed)
		freed = rest
		if err := w.writeBitmap(p.blockBitmaps[g], bitmap); err != nil {
			return err
		}
		used := min(max(p.used-g*p.inodesPerGroup, 0), p.inodesPerGroup)
		flags := uint16(groupInodesZeroed)
		if used == 0 {
			flags |= groupInodesUnused
		} else {
			b := make([]byte, blockSize)
			setBits(b, 0, used)
			setBits(b, p.inodesPerGroup, 8*blockSize)
			if err := w.writeBlock(p.inodeBitmaps[g], b); err != nil {
				return err
			}
		}
		d := desc[g*descSize:]
		le.PutUint32(d[0:], uint32(p.blockBitmaps[g]))
		le.PutUint32(d[4:], uint32(p.inodeBitmaps[g]))
		le.PutUint32(d[8:], uint32(p.tables[g]))
		le.PutUint16(d[12:], uint16(free))
		le.PutUint16(d[14:], uint16(p.inodesPerGroup-used))
		le.PutUint16(d[16:], uint16(p.folders[g]))
		le.PutUint16(d[18:], flags)
		le.PutUint16(d[28:], uint16(p.inodesPerGroup-used))
		le.PutUint16(d[30:], w.groupSum(uint32(g), d[:30]))
		freeBlocks += free
		freeInodes += p.inodesPerGroup - used
	}
	sb := w.superblock(p, journal, freeBlocks, freeInodes)
	for g := range p.groups {
		if !hasBackup(g) {
			continue
		}
		le.PutUint16(sb[90:], uint16(g))
		block, b := g*blocksPerGroup, make([]byte, blockSize)
		if g == 0 {
			copy(b[1024:], sb)
		} else {
			copy(b, sb)
		}
		if err := w.writeBlock(block, b); err != nil {
			return err
		}
		if err := w.out.write(desc, (block+1)*blockSize); err != nil {
			return err
		}
	}
	return nil
}

// writeBitmap leaves out what is zero already.
func (w *Writer) writeBitmap(block int64, bits []byte) error {
	if zero(bits) {
		return nil
	}
	return w.writeBlock(block, bits)
}

// blockBitmap is that of group g, with the number of its free blocks; freed
// are sorted, and what is of groups behind this one is the rest.
func (p *plan) blockBitmap(g int64, freed []extent) (bitmap []byte, free int64, rest []extent) {
	bitmap = make([]byte, blockSize)
	from, to := g*blocksPerGroup, min((g+1)*blocksPerGroup, p.blocks)
	setBits(bitmap, 0, min(max(p.end-from, 0), blocksPerGroup))
	for len(freed) > 0 && freed[0].phys < to {
		e := freed[0]
		clearBits(bitmap, max(e.phys-from, 0), min(e.phys+e.n, to)-from)
		if e.phys+e.n > to {
			break
		}
		freed = freed[1:]
	}
	if hasBackup(g) {
		clearBits(bitmap, 0, min(p.head, to-from))
		setBits(bitmap, 0, 1+p.descBlocks)
	}
	setBits(bitmap, to-from, blocksPerGroup)
	for _, b := range bitmap {
		free += int64(8 - bits.OnesCount8(b))
	}
	return bitmap, free, freed
}

func setBits(b []byte, from, to int64) {
	for i := from; i < to; i++ {
		b[i/8] |= 1 << (i % 8)
	}
}

func clearBits(b []byte, from, to int64) {
	for i := from; i < to; i++ {
		b[i/8] &^= 1 << (i % 8)
	}
}

// groupSum is the CRC-16 of a group's descriptor.
func (w *Writer) groupSum(g uint32, desc []byte) uint16 {
	crc := uint16(0xffff)
	add := func(p []byte) {
		for _, b := range p {
			crc ^= uint16(b)
			for range 8 {
				if crc&1 != 0 {
					crc = crc>>1 ^ 0xa001
				} else {
					crc >>= 1
				}
			}
		}
	}
	add(w.uuid[:])
	add(binary.LittleEndian.AppendUint32(nil, g))
	add(desc)
	return crc
}

func (w *Writer) superblock(p *plan, journal *Inode, freeBlocks, freeInodes int64) []byte {
	sb := make([]byte, 1024)
	le := binary.LittleEndian
	made := uint32(0)
	if t := w.o.Time; !t.IsZero() {
		made = uint32(min(max(t.Unix(), 0), 1<<32-1))
	}
	for _, f := range []struct {
		at int
		v  int64
	}{
		{0, p.inodesPerGroup * p.groups}, {4, p.blocks}, {12, freeBlocks}, {16, freeInodes},
		{24, 2}, {28, 2}, {32, blocksPerGroup}, {36, blocksPerGroup}, {40, p.inodesPerGroup},
		{48, int64(made)}, {64, int64(made)}, {76, 1}, {84, firstInode},
		{92, compatFeatures}, {96, incompatFeatures}, {100, roFeatures},
		{224, journalInode}, {256, 0xc}, {264, int64(made)},
		{352, 2}, // names are hashed as unsigned bytes
	} {
		le.PutUint32(sb[f.at:], uint32(f.v))
	}
	for _, f := range []struct{ at, v uint16 }{{54, 0xffff}, {56, 0xef53}, {58, 1}, {60, 1}, {88, inodeSize}, {348, 32}, {350, 32}} {
		le.PutUint16(sb[f.at:], f.v)
	}
	copy(sb[104:120], w.uuid[:])
	copy(sb[120:136], w.o.Label)
	copy(sb[236:252], w.seed[:])
	sb[252], sb[253] = 1, 1 // half MD4; the journal's inode is kept here, too
	copy(sb[268:328], journal.block[:])
	le.PutUint32(sb[328:], uint32(journal.size>>32))
	le.PutUint32(sb[332:], uint32(journal.size))
	sb[372] = 4 // groups to a flexible one, as a power of two
	return sb
}
