package cowdisk

import (
	"bytes"
	"context"
)

// Comparison is the result of Compare.
type Comparison struct {
	Equal        bool  // same contents; where one disk is longer, the rest of it is zeros
	Offset       int64 // of the first difference, when not Equal
	SizeA, SizeB int64 // bytes
}

// Compare compares the contents of two disks, each a COW image with its chain or a raw file, as o.Format (of a) and o.OtherFormat say.
func Compare(ctx context.Context, a, b string, o ToolOptions) (c Comparison, err error) {
	o.ReadOnly = true
	da, err := OpenAny(a, o.Options)
	if err != nil {
		return c, err
	}
	defer da.Close()
	o.Format = o.OtherFormat
	db, err := OpenAny(b, o.Options)
	if err != nil {
		return c, err
	}
	defer db.Close()
	c.SizeA, c.SizeB = da.size, db.size
	p := &progress{ctx: ctx, f: o.Progress, total: max(da.size, db.size)}
	c.Offset, err = firstDifference(da.chain, db.chain, 0, p.total, p)
	c.Equal = err == nil && c.Offset < 0
	if c.Equal {
		c.Offset = 0
	}
	return c, err
}

// firstDifference compares n bytes at off as two chains have them; -1 = none. Beyond its end a chain reads as zeros.
func firstDifference(a, b *chain, off, n int64, p *progress) (int64, error) {
	x, y := getBuf(), getBuf()
	defer putBuf(x)
	defer putBuf(y)
	for n > 0 {
		same, k, err := sameSource(a, b, off, n)
		if err != nil {
			return -1, err
		}
		if !same {
			k = min(k, bufBytes)
			if err := a.readBelow(0, x[:k], off); err != nil {
				return -1, err
			}
			if err := b.readBelow(0, y[:k], off); err != nil {
				return -1, err
			}
			if !bytes.Equal(x[:k], y[:k]) {
				for i := range x[:k] {
					if x[i] != y[i] {
						return off + int64(i), nil
					}
				}
			}
		}
		off, n = off+k, n-k
		if err := p.add(k); err != nil {
			return -1, err
		}
	}
	return -1, nil
}

// sameSource reports whether the bytes at off need no reading to be known equal: the same place of the same file, or zeros in both. It
// holds for length bytes.
func sameSource(a, b *chain, off, n int64) (same bool, length int64, err error) {
	ka, na, err := a.knownSource(off, n)
	if err != nil {
		return false, 0, err
	}
	kb, nb, err := b.knownSource(off, n)
	return ka == kb && ka != source{}, min(na, nb), err
}

// source is a place in a file, or zeros; the zero value is unknown.
type source struct {
	zero bool
	id   FileID
	pos  int64
}

func (c *chain) knownSource(off, n int64) (source, int64, error) {
	e, err := c.extent(off, n)
	if err != nil {
		return source{}, 0, err
	}
	if e.Zero {
		return source{zero: true}, e.Length, nil
	}
	if id := c.layers[e.Depth].id; id != (FileID{}) {
		return source{id: id, pos: *e.Offset}, e.Length, nil
	}
	return source{}, e.Length, nil
}
