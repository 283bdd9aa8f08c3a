package virtioblk

import (
	"encoding/binary"

	"github.com/moovm/moovm/virtio"
)

// request is one request on its way: parsed, then executed. Every worker has
// one and uses it over and over.
type request struct {
	chain  *virtio.DescriptorChain
	status *virtio.ChainWriter // the last writable byte
	kind   kind
	typ    uint32
	sector uint64
	size   int // bytes of data

	bufs     [][]byte
	segments [maxSegments]segment
}

// segment is a range of a discard or write-zeroes request.
type segment struct {
	off, n int64
	unmap  bool
}

// parse reads the header. It reports false for a chain without a status byte
// or header: there is nothing to execute.
func (r *request) parse(c *virtio.DescriptorChain) bool {
	r.chain, r.kind, r.size = c, kindOther, 0
	in, out := c.Reader(), c.Writer()
	var err error
	if r.status, err = out.SplitLast(1); err != nil {
		return false
	}
	var h [headerSize]byte
	if n, _ := in.Read(h[:]); n < headerSize {
		return false
	}
	r.typ = binary.LittleEndian.Uint32(h[0:])
	r.sector = binary.LittleEndian.Uint64(h[8:])
	switch r.typ {
	case typeIn:
		r.kind, r.size = kindRead, out.Len()
	case typeOut:
		r.kind, r.size = kindWrite, in.Len()
	case typeFlush:
		r.kind = kindFlush
	case typeDiscard:
		r.kind = kindDiscard
	case typeWriteZeroes:
		r.kind = kindWriteZeroes
	}
	return true
}

// finish writes the status byte, if the chain has room for one.
func (r *request) finish(status byte) {
	if r.status != nil {
		r.status.Write([]byte{status})
	}
}

// execute does what the request asks for and returns its status.
func (d *Device) execute(r *request) byte {
	switch r.typ {
	case typeIn:
		return d.executeRead(r)
	case typeOut:
		return d.executeWrite(r)
	case typeFlush:
		// Also on a read-only disk: firmware flushes what it only reads.
		if d.readOnly {
			return statusOK
		}
		return d.result(r, d.backend.Flush())
	case typeGetID:
		w := r.chain.Writer()
		w.Write(d.serial[:min(serialSize, w.Len())])
		return statusOK
	case typeDiscard, typeWriteZeroes:
		return d.executeSegments(r)
	default:
		return statusUnsupp
	}
}

func (d *Device) result(r *request, err error) byte {
	if err != nil {
		d.warn(opNames[r.kind], r.sector, r.size, err)
		return statusIOErr
	}
	return statusOK
}

var opNames = [numKinds]string{"other", "read", "write", "flush", "discard", "write zeroes"}

// inside reports whether n sectors at sector lie inside the disk.
func (d *Device) inside(sector, n uint64) bool {
	c := d.capacity.Load()
	return sector <= c && n <= c-sector
}

func (d *Device) executeRead(r *request) byte {
	if r.size%sectorSize != 0 || !d.inside(r.sector, uint64(r.size)/sectorSize) {
		return statusIOErr
	}
	w := r.chain.Writer()
	r.bufs, _ = w.Buffers(r.size, r.bufs[:0]) // size is what w has
	err := d.backend.read(r.bufs, int64(r.sector)*sectorSize, r.size)
	if err != nil {
		w.Unwrite(r.size) // how much arrived is not known
	}
	return d.result(r, err)
}

func (d *Device) executeWrite(r *request) byte {
	if d.readOnly || r.size%sectorSize != 0 || !d.inside(r.sector, uint64(r.size)/sectorSize) {
		return statusIOErr
	}
	r.bufs, _ = r.chain.Reader().Buffers(r.size, r.bufs[:0])
	err := d.backend.write(r.bufs, int64(r.sector)*sectorSize, r.size)
	return d.result(r, d.through(err))
}

// through completes a write for a driver that expects no write cache.
func (d *Device) through(err error) error {
	if err == nil && d.writeThrough.Load() {
		err = d.backend.Flush()
	}
	return err
}

// executeSegments discards or zeroes the ranges of a request. All are checked
// before the first is touched.
func (d *Device) executeSegments(r *request) byte {
	feature := FeatureDiscard
	if r.typ == typeWriteZeroes {
		feature = FeatureWriteZeroes
	}
	switch {
	case d.readOnly:
		return statusIOErr
	case d.features.Load()&feature == 0:
		return statusUnsupp
	}
	in := r.chain.Reader()
	count := in.Len() / segmentSize
	if count == 0 || count > maxSegments || in.Len()%segmentSize != 0 {
		return statusIOErr
	}
	for i := range count {
		var b [segmentSize]byte
		in.Read(b[:])
		sector, n := binary.LittleEndian.Uint64(b[0:]), binary.LittleEndian.Uint32(b[8:])
		flags := binary.LittleEndian.Uint32(b[12:])
		// A discard has no flags; write-zeroes has one (section 5.2.6.2).
		if flags&^flagUnmap != 0 || flags != 0 && r.typ == typeDiscard {
			return statusUnsupp
		}
		if n > maxSegmentSectors || !d.inside(sector, uint64(n)) {
			return statusIOErr
		}
		r.segments[i] = segment{int64(sector) * sectorSize, int64(n) * sectorSize, flags&flagUnmap != 0}
	}
	for _, s := range r.segments[:count] {
		var err error
		if r.typ == typeDiscard {
			err = d.backend.discard.Discard(s.off, s.n)
		} else {
			err = d.backend.zeroes.WriteZeroes(s.off, s.n, s.unmap)
		}
		if err != nil {
			return d.result(r, err)
		}
		r.size += int(s.n)
	}
	return d.result(r, d.through(nil))
}
