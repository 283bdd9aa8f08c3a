package cowdisk

// WriteAt writes p. Sectors that are not in the overlay yet are allocated in units of 4 KiB; the rest of a unit that is written in part is
// copied up. An error means that each sector of the range is old or new, and it is reported again by Flush. Beyond the end: ErrRange.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	g, err := d.begin(off, int64(len(p)), true)
	if g == nil {
		return 0, err
	}
	defer g.Add(-1)
	top := d.chain.top
	present, err := top.present(off, int64(len(p)))
	switch {
	case err != nil:
	case present:
		err = writeFull(top.file, p, top.data+off)
		d.wrote()
	default:
		v := getVector()
		v.one[0] = p
		err = d.allocate(v, v.one[:], off, int64(len(p)))
		v.put()
	}
	return d.wroteAll(int64(len(p)), err)
}

// WritevAt writes all of bufs to consecutive bytes of the disk, like WriteAt.
func (d *Disk) WritevAt(bufs [][]byte, off int64) (int, error) {
	n := totalLen(bufs)
	g, err := d.begin(off, n, true)
	if g == nil {
		return 0, err
	}
	defer g.Add(-1)
	top := d.chain.top
	v := getVector()
	present, err := top.present(off, n)
	switch {
	case err != nil:
	case present:
		v.bufs = append(v.bufs[:0], bufs...)
		err = writevFull(top.file, v.bufs, top.data+off)
		d.wrote()
	default:
		err = d.allocate(v, bufs, off, n)
	}
	v.put()
	return d.wroteAll(n, err)
}

// wroteAll is what a write of n bytes returns.
func (d *Disk) wroteAll(n int64, err error) (int, error) {
	if err != nil {
		d.failWrite(err)
		return 0, err
	}
	return int(n), nil
}

// present reports whether every byte of the range is in this layer's file.
func (l *layer) present(off, n int64) (bool, error) {
	if l.bm == nil {
		return true, nil
	}
	if found := l.bm.peek(off, n); found != unknown {
		return found == allPresent, nil
	}
	sector := off / sectorSize
	return l.bm.all(sector, (off+n-1)/sectorSize-sector+1)
}

// units is the range of whole allocation units around [off, off+n), cut at the end of the disk.
func (d *Disk) units(off, n int64) span {
	return span{off &^ (unitSize - 1), min((off+n+unitSize-1)&^(unitSize-1), d.size)}
}

// allocate writes a range of which some sectors are not in the overlay. Wherever its sectors are now, in the file the range is one piece,
// so it is one write, with what has to be copied up before and after it.
func (d *Disk) allocate(v *vector, bufs [][]byte, off, n int64) error {
	top := d.chain.layers[0]
	u := d.units(off, n)
	if (u.hi+sectorSize-1)/sectorSize > top.bm.sectors() {
		return &Error{Path: d.path, Field: "bitmap", Kind: ErrNoBit, Detail: "the last sectors of this layout cannot be written", Remedy: "flatten it to a v2 or v3 image"}
	}
	d.locks.lock(u)
	defer d.locks.unlock(u)
	head, err := d.copyUp(top, v.head[:], u.lo, off)
	if err != nil {
		return err
	}
	tail, err := d.copyUp(top, v.tail[:], off+n, u.hi)
	if err != nil {
		return err
	}
	start := off
	v.bufs = v.bufs[:0]
	if len(head) > 0 {
		v.bufs = append(v.bufs, head)
		start = u.lo
	}
	v.bufs = append(v.bufs, bufs...)
	if len(tail) > 0 {
		v.bufs = append(v.bufs, tail)
	}
	err = writevFull(top.file, v.bufs, top.data+start)
	d.wrote()
	if err != nil {
		return err
	}
	return d.setBits(top, u)
}

// setBits allocates whole units whose data has been written.
func (d *Disk) setBits(top *layer, u span) error {
	lo := u.lo / sectorSize
	if err := top.bm.set(lo, (u.hi+sectorSize-1)/sectorSize-lo); err != nil {
		return err
	}
	// Bits that wait for a flush take memory that cannot be given back.
	if n := top.bm.dirtyPages(); n > top.bm.limit/2 {
		return d.flush.run(d.flushPass)
	}
	return nil
}

// copyUp sees to the part [lo, hi) of a unit that is not written by the request. When all of it has to come from below it is returned in
// buf, to be written along with the request; when it is a mixture, which only other programs make, the missing pieces are written here.
func (d *Disk) copyUp(top *layer, buf []byte, lo, hi int64) ([]byte, error) {
	if lo >= hi {
		return nil, nil
	}
	copied := false
	for off := lo; off < hi; {
		sector := off / sectorSize
		allocated, k, err := top.bm.run(sector, (hi-1)/sectorSize-sector+1)
		if err != nil {
			return nil, err
		}
		end := min((sector+k)*sectorSize, hi)
		if !allocated {
			p := buf[:end-off]
			if err := d.chain.readBelow(1, p, off); err != nil {
				return nil, err
			}
			copied = true
			if off == lo && end == hi {
				d.copyUps.Add(1)
				return p, nil
			}
			err := writeFull(top.file, p, top.data+off)
			d.wrote()
			if err != nil {
				return nil, err
			}
		}
		off = end
	}
	if copied {
		d.copyUps.Add(1)
	}
	return nil, nil
}
