package cowdisk

import (
	"errors"
)

// zeroMode is what a range is to be zeroed with.
type zeroMode int

const (
	zeroKeep    zeroMode = iota // the space stays
	zeroUnmap                   // the space may be given back
	zeroDiscard                 // the space is to be given back, or the data stays: nothing is written
)

// errNotZeroed says that zeroDiscard has to leave the data.
var errNotZeroed = errors.New("the file system can neither punch holes nor zero ranges")

// Discard makes a range read as zeros and gives its space back. Whatever lies in the backing file is not shown again: the sectors stay
// (or become) allocated, as holes. Where the file system can neither punch holes nor zero ranges all or part of the data stays, as a discard
// promises nothing about it and must not take space.
func (d *Disk) Discard(off, n int64) error {
	err := d.zeroRange(off, n, zeroDiscard)
	if err == errNotZeroed {
		return nil
	}
	return err
}

// WriteZeroes makes a range read as zeros; mayUnmap allows giving its space back. Any offset and length will do. Beyond the end: ErrRange.
func (d *Disk) WriteZeroes(off, n int64, mayUnmap bool) error {
	mode := zeroKeep
	if mayUnmap {
		mode = zeroUnmap
	}
	return d.zeroRange(off, n, mode)
}

func (d *Disk) zeroRange(off, n int64, mode zeroMode) error {
	g, err := d.begin(off, n, true)
	if g == nil {
		return err
	}
	defer g.Add(-1)
	err = d.zero(off, off+n, mode)
	if err != nil && err != errNotZeroed {
		d.failWrite(err)
	}
	return err
}

func (d *Disk) zero(off, end int64, mode zeroMode) error {
	if mode == zeroDiscard && d.noPunch.Load() && d.noZero.Load() {
		return errNotZeroed
	}
	top := d.chain.layers[0]
	for off < end {
		owner, n, err := d.chain.find(off, end-off)
		if err != nil {
			return err
		}
		switch {
		case owner < 0: // reads as zeros: a hole stays a hole
		case owner == 0: // in the overlay already
			if err := d.zeroFile(top, off, n, mode); err != nil {
				return err
			}
		default:
			if n, err = d.zeroNew(top, off, end, n, mode); err != nil {
				return err
			}
		}
		off += n
	}
	return nil
}

// zeroNew zeroes sectors at off that a lower layer owns for n bytes, which allocates them. It returns how far it came.
func (d *Disk) zeroNew(top *layer, off, end, n int64, mode zeroMode) (int64, error) {
	last := end
	if end != d.size {
		last &^= unitSize - 1
	}
	if rest := off % unitSize; rest != 0 || last <= off {
		n = min(unitSize-rest, end-off) // part of a unit: the rest must be copied up
		v := getVector()
		defer v.put()
		v.one[0] = zeros[:n]
		return n, d.allocate(v, v.one[:], off, n)
	}
	// Whole units; what others own of the last one is to be zeroed just the same.
	hi := min((off+n+unitSize-1)&^(unitSize-1), last, off+zeroChunk)
	u := span{off, hi}
	if (hi+sectorSize-1)/sectorSize > top.bm.sectors() {
		if hi = min(hi, top.bm.sectors()*sectorSize); hi <= off {
			return 0, &Error{Path: d.path, Field: "bitmap", Kind: ErrNoBit, Detail: "the last sectors of this layout cannot be written", Remedy: "flatten it to a v2 or v3 image"}
		}
		u.hi = hi
	}
	d.locks.lock(u)
	defer d.locks.unlock(u)
	// There may be leftovers of a crash under a clear bit, so the hole is punched even where there should be one.
	if err := d.zeroFile(top, u.lo, u.hi-u.lo, mode); err != nil {
		return 0, err
	}
	if err := d.extend(top, top.data+u.hi); err != nil {
		return 0, err
	}
	return u.hi - u.lo, d.setBits(top, u)
}

// zeroChunk bounds how many bits become dirty at once: 64 bitmap pages.
const zeroChunk = 64 * pageSectors * sectorSize

// extend makes the file reach to end, so that no bit points beyond it. It writes the last sector rather than setting the size, which could
// cut off what another writer appends at this moment.
func (d *Disk) extend(top *layer, end int64) error {
	st, err := top.file.Stat()
	if err != nil || st.Size >= end {
		return err
	}
	err = writeFull(top.file, zeros[:sectorSize], end-sectorSize)
	d.wrote()
	return err
}

func (d *Disk) zeroFile(top *layer, off, n int64, mode zeroMode) error {
	defer d.wrote()
	pos := top.data + off
	if mode != zeroKeep && !d.noPunch.Load() {
		err := top.file.PunchHole(pos, n)
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
		d.noPunch.Store(true)
	}
	if !d.noZero.Load() {
		err := top.file.ZeroRange(pos, n)
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
		d.noZero.Store(true)
	}
	if mode == zeroDiscard {
		return errNotZeroed
	}
	for n > 0 {
		k := min(n, bufBytes)
		if err := writeFull(top.file, zeros[:k], pos); err != nil {
			return err
		}
		pos, n = pos+k, n-k
	}
	return nil
}
