package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// Table entries (QEMU, docs/interop/qcow2.txt, "Cluster mapping" and "Extended L2 Entries").
const (
	offsetMask     = 0x00fffffffffffe00 // bits 9-55
	flagCopied     = 1 << 63
	flagCompressed = 1 << 62
	flagZero       = 1
	subclusters    = 32
	sliceBytes     = 4096 // L2 tables are read and kept in pieces of this size
)

// run is a range of the disk that lies in one place.
type run struct {
	kind   Kind
	packed bool  // compressed clusters
	host   int64 // where data begins in the file
	length int64 // bytes
}

// loadL1 reads the part of the L1 table that the disk needs.
func (m *Image) loadL1() error {
	h := &m.hdr
	span := m.sliceSpan * (h.ClusterSize / m.sliceLen) // of the disk that one L2 table describes
	need := int64(0)
	if h.Size > 0 {
		need = (h.Size-1)/span + 1
	}
	switch {
	case h.l1Size > maxL1Bytes/8:
		return m.fail("l1_size", ErrHeader, fmt.Sprintf("%d entries, at most %d are allowed", h.l1Size, maxL1Bytes/8), "get it anew")
	case need > h.l1Size:
		return m.fail("l1_size", ErrHeader, fmt.Sprintf("%d entries, a disk of %d bytes needs %d", h.l1Size, h.Size, need), "get it anew")
	case need > 0 && h.l1Offset == 0:
		return m.fail("l1_table_offset", ErrHeader, "0", "get it anew")
	case h.l1Offset > m.fileSize || need*8 > m.fileSize-h.l1Offset:
		return m.fail("L1 table", ErrTruncated, fmt.Sprintf("%d bytes at %d, the file has %d", need*8, h.l1Offset, m.fileSize), "get it anew")
	}
	m.l1 = make([]uint64, need)
	var b [sliceBytes]byte
	for i := int64(0); i < need; i += sliceBytes / 8 {
		part := m.l1[i:min(i+sliceBytes/8, need)]
		if err := readExact(m.file, b[:len(part)*8], h.l1Offset+i*8); err != nil {
			return m.wrap("L1 table", ErrRead, err)
		}
		for j := range part {
			part[j] = binary.BigEndian.Uint64(b[j*8:])
		}
	}
	return nil
}

// slice is the piece of an L2 table that describes the disk at off; nil = there is none.
func (m *Image) slice(off int64) ([]uint64, error) {
	key := off / m.sliceSpan
	if s := m.tables.get(key); s != nil {
		return s, nil
	}
	each := m.hdr.ClusterSize / m.sliceLen // slices in an L2 table
	e := m.l1[key/each]
	if e&^(offsetMask|flagCopied) != 0 || int64(e&offsetMask)%m.hdr.ClusterSize != 0 {
		return nil, m.fail("L1 table", ErrCorrupt, fmt.Sprintf("entry %d is %#x", key/each, e), "mend it: qemu-img check -r all "+m.name)
	}
	pos := int64(e & offsetMask)
	if pos == 0 {
		return nil, nil
	}
	if pos > m.fileSize-m.hdr.ClusterSize {
		return nil, m.fail("L2 table", ErrTruncated, fmt.Sprintf("at %d, the file has %d bytes", pos, m.fileSize), "get it anew")
	}
	b := make([]byte, m.sliceLen)
	if err := readExact(m.file, b, pos+key%each*m.sliceLen); err != nil {
		return nil, m.wrap("L2 table", ErrRead, err)
	}
	s := make([]uint64, len(b)/8)
	for i := range s {
		s[i] = binary.BigEndian.Uint64(b[i*8:])
	}
	m.tables.put(key, s)
	return s, nil
}

// find says where the disk's bytes from off on lie, and for how many of them, at most n (at least 1), that is so.
func (m *Image) find(off, n int64) (run, error) {
	s, err := m.slice(off)
	if err != nil {
		return run{}, err
	}
	if s == nil {
		span := m.sliceSpan * (m.hdr.ClusterSize / m.sliceLen)
		return run{kind: Absent, length: min(n, span-off%span)}, nil
	}
	n = min(n, m.sliceSpan-off%m.sliceSpan)
	r, err := m.entry(s, off)
	if err != nil {
		return run{}, err
	}
	for r.length < n {
		next, err := m.entry(s, off+r.length)
		if err != nil {
			break // whoever reads on meets it again
		}
		if next.kind != r.kind || next.packed != r.packed || r.kind == Data && !r.packed && next.host != r.host+r.length {
			break
		}
		r.length += next.length
	}
	r.length = min(r.length, n)
	return r, nil
}

// entry is the run in one cluster or subcluster at off, which lies in slice s.
func (m *Image) entry(s []uint64, off int64) (run, error) {
	i := off % m.sliceSpan >> m.hdr.clusterBits
	in := off & (m.hdr.ClusterSize - 1)
	r := run{length: m.hdr.ClusterSize - in}
	e := s[i*m.words]
	pos := int64(e & offsetMask)
	if e&flagCompressed != 0 {
		r.kind, r.packed = Data, true
		return r, nil
	}
	bad := e &^ (offsetMask | flagCopied)
	if m.hdr.Version == 3 && !m.hdr.ExtendedL2 {
		bad &^= flagZero
	}
	if bad != 0 || pos&(m.hdr.ClusterSize-1) != 0 {
		return r, m.badEntry(off, e)
	}
	if m.hdr.ExtendedL2 {
		if err := m.subcluster(&r, s[i*m.words+1], in, off, e); err != nil {
			return r, err
		}
	} else {
		switch {
		case e&flagZero != 0:
			r.kind = Zero
		case pos != 0:
			r.kind = Data
		case e != 0: // a cluster that is in use where the header lies
			return r, m.badEntry(off, e)
		}
	}
	if r.kind == Data {
		if r.host = pos + in; pos == 0 {
			return r, m.badEntry(off, e)
		} else if pos >= m.fileSize {
			return r, m.fail("data cluster", ErrTruncated, fmt.Sprintf("at %d, the file has %d bytes", pos, m.fileSize), "get it anew")
		}
	}
	return r, nil
}

// subcluster makes r what the bitmap of an extended L2 entry says about the byte in of the cluster.
func (m *Image) subcluster(r *run, bitmap uint64, in, off int64, e uint64) error {
	alloc, zero := uint32(bitmap), uint32(bitmap>>32)
	if alloc&zero != 0 {
		return m.badEntry(off, e)
	}
	size := m.hdr.ClusterSize / subclusters
	k := in / size
	same := ^(alloc | zero)
	switch {
	case alloc>>k&1 != 0:
		r.kind, same = Data, alloc
	case zero>>k&1 != 0:
		r.kind, same = Zero, zero
	}
	count := int64(bits.TrailingZeros32(^(same >> k)))
	r.length = min(count, subclusters-k)*size - in%size
	return nil
}

func (m *Image) badEntry(off int64, e uint64) error {
	return m.fail("L2 table", ErrCorrupt, fmt.Sprintf("the entry for byte %d of the disk is %#x", off, e), "mend it: qemu-img check -r all "+m.name)
}
