package cowdisk

import (
	"errors"
	"io"
)

var errShortWrite = io.ErrShortWrite

func isEOF(err error) bool { return errors.Is(err, io.EOF) }

// chain is the layers from the top down. Each hides what lies below; limit[i] is how far layer i can be seen: no layer shows more than the
// shortest layer above it.
type chain struct {
	top    *layer // layers[0]
	layers []*layer
	limit  []int64
}

func newChain(layers []*layer) *chain {
	c := &chain{layers: layers, limit: make([]int64, len(layers))}
	if len(layers) > 0 {
		c.top = layers[0]
	}
	for i, l := range layers {
		c.limit[i] = l.size
		if i > 0 {
			c.limit[i] = min(l.size, c.limit[i-1])
		}
	}
	return c
}

// find says which layer owns the byte at off (-1: none, it reads as zero) and for how many bytes from there on, at most n, that is so.
func (c *chain) find(off, n int64) (owner int, length int64, err error) {
	return c.findBelow(0, off, n)
}

// findBelow looks at layers from `from` on only: what the disk would read if the ones above had nothing.
func (c *chain) findBelow(from int, off, n int64) (owner int, length int64, err error) {
	for i := from; i < len(c.layers); i++ {
		if off >= c.limit[i] {
			return -1, n, nil
		}
		n = min(n, c.limit[i]-off)
		l := c.layers[i]
		if l.bm == nil {
			return i, n, nil
		}
		sector := off / sectorSize
		allocated, k, err := l.bm.run(sector, (off+n-1)/sectorSize-sector+1)
		if err != nil {
			return 0, 0, err
		}
		n = min(n, (sector+k)*sectorSize-off)
		if allocated {
			return i, n, nil
		}
	}
	return -1, n, nil
}

// read reads p. A small request that lies in one layer altogether, the commonest one, takes a short way.
func (c *chain) read(p []byte, off int64) error {
	if l := c.top; l.bm != nil {
		switch l.bm.peek(off, int64(len(p))) {
		case allPresent:
			return readFull(l.file, p, l.data+off)
		case nonePresent:
			return c.readBelow(1, p, off)
		}
	}
	return c.readBelow(0, p, off)
}

// readBelow reads p as layers from `from` on have it.
func (c *chain) readBelow(from int, p []byte, off int64) error {
	for len(p) > 0 {
		owner, n, err := c.findBelow(from, off, int64(len(p)))
		if err != nil {
			return err
		}
		if owner < 0 {
			clear(p[:n])
		} else if l := c.layers[owner]; true {
			if err := readFull(l.file, p[:n], l.data+off); err != nil {
				return err
			}
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readv is readBelow into several buffers: one preadv a run.
func (c *chain) readv(bufs [][]byte, off, n int64) error {
	v := getVector()
	defer v.put()
	cur := cursor{bufs: bufs}
	for n > 0 {
		owner, k, err := c.find(off, n)
		if err != nil {
			return err
		}
		v.bufs = cur.take(v.bufs[:0], k)
		if owner < 0 {
			for _, b := range v.bufs {
				clear(b)
			}
		} else if l := c.layers[owner]; true {
			if err := readvFull(l.file, v.bufs, l.data+off); err != nil {
				return err
			}
		}
		off, n = off+k, n-k
	}
	return nil
}
