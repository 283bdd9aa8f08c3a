package ext4

import "encoding/binary"

// extent is a run of blocks of a file.
type extent struct{ logical, phys, n int64 }

const maxExtent = 32768 // blocks; more would say "not written"

func addExtent(es []extent, e extent) []extent {
	for e.n > 0 {
		if k := len(es) - 1; k >= 0 {
			l := &es[k]
			if l.logical+l.n == e.logical && l.phys+l.n == e.phys && l.n < maxExtent {
				m := min(e.n, maxExtent-l.n)
				l.n += m
				e.logical, e.phys, e.n = e.logical+m, e.phys+m, e.n-m
				continue
			}
		}
		m := min(e.n, maxExtent)
		es = append(es, extent{e.logical, e.phys, m})
		e.logical, e.phys, e.n = e.logical+m, e.phys+m, e.n-m
	}
	return es
}

const (
	extentMagic = 0xf30a
	perNode     = (blockSize - 12) / 12
)

// layoutExtents writes the tree of n's extents, and fills in i_block.
func (w *Writer) layoutExtents(n *Inode) error {
	for _, e := range n.extents {
		n.blocks += e.n
	}
	type ref struct{ logical, block int64 }
	var level []ref
	depth := uint16(0)
	count := len(n.extents)
	put := func(b []byte, at, k int) {
		le := binary.LittleEndian
		le.PutUint16(b[0:], extentMagic)
		le.PutUint16(b[2:], uint16(k))
		le.PutUint16(b[4:], uint16((len(b)-12)/12))
		le.PutUint16(b[6:], depth)
		for i := range k {
			p := b[12+12*i:]
			if depth == 0 {
				e := n.extents[at+i]
				le.PutUint32(p[0:], uint32(e.logical))
				le.PutUint16(p[4:], uint16(e.n))
				le.PutUint32(p[8:], uint32(e.phys))
			} else {
				le.PutUint32(p[0:], uint32(level[at+i].logical))
				le.PutUint32(p[4:], uint32(level[at+i].block))
			}
		}
	}
	for count > 4 {
		var above []ref
		for at := 0; at < count; at += perNode {
			k := min(perNode, count-at)
			e, err := w.alloc(1)
			if err != nil {
				return err
			}
			b := make([]byte, blockSize)
			put(b, at, k)
			if err := w.writeBlock(e.phys, b); err != nil {
				return err
			}
			n.blocks++
			first := int64(0)
			if depth == 0 {
				first = n.extents[at].logical
			} else {
				first = level[at].logical
			}
			above = append(above, ref{first, e.phys})
		}
		level, count = above, len(above)
		depth++
	}
	put(n.block[:], 0, count)
	return nil
}
