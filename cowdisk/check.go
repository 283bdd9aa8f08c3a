package cowdisk

import (
	"context"
	"errors"
	"fmt"
)

// ProblemKind says what Check found.
type ProblemKind string

// What Check looks for.
const (
	ProblemHeader      ProblemKind = "header"          // fields that make no sense, or pads that are not zero (repairable)
	ProblemBitmap      ProblemKind = "bitmap"          // the file ends inside the bitmap (repairable when what is there is empty)
	ProblemBeyondEnd   ProblemKind = "bits-beyond-end" // bits after the last sector (repairable)
	ProblemDataMissing ProblemKind = "data-missing"    // the file ends before data that the bitmap promises; it reads as zeros
	ProblemOversized   ProblemKind = "oversized"       // the file goes on after the last sector (repairable when that is zeros)
	ProblemBacking     ProblemKind = "backing"         // the backing file is missing, stale, damaged, out of bounds, or a loop
)

// Problem is one finding.
type Problem struct {
	Kind     ProblemKind `json:"kind"`
	Detail   string      `json:"detail"`
	Repaired bool        `json:"repaired"`
	Err      error       `json:"-"` // the error that opening the image would give; may be nil
}

// CheckResult is what Check found.
type CheckResult struct {
	Filename         string    `json:"filename"`
	Problems         []Problem `json:"problems"`
	AllocatedSectors int64     `json:"allocated-sectors"`
	TotalSectors     int64     `json:"total-sectors"`
	// LeakedBytes is space that no bit points at: what a crash before a flush leaves. It does no harm and is no problem; repair frees it.
	LeakedBytes int64 `json:"leaked-bytes"`
}

// Clean reports whether there was nothing to complain about.
func (r *CheckResult) Clean() bool { return len(r.Problems) == 0 }

// Repaired reports whether every problem was repaired.
func (r *CheckResult) Repaired() bool {
	for _, p := range r.Problems {
		if !p.Repaired {
			return false
		}
	}
	return true
}

func (r *CheckResult) add(k ProblemKind, repaired bool, err error, format string, args ...any) {
	r.Problems = append(r.Problems, Problem{Kind: k, Detail: fmt.Sprintf(format, args...), Repaired: repaired, Err: err})
}

// Check examines the image at path. With repair it mends what can be mended without losing data. What it finds is in the result; an error
// means that it could not look. A file that is no COW image at all is ErrNotCOW.
func Check(ctx context.Context, path string, repair bool, o ToolOptions) (*CheckResult, error) {
	fsys := o.fs()
	real, err := fsys.Resolve(path)
	if err != nil {
		return nil, err
	}
	f, err := fsys.Open(real, OpenMode{Write: repair, NoLock: !repair && o.NoLock})
	if err != nil {
		return nil, renamed(err, real, path)
	}
	c := checker{ctx: ctx, o: o, repair: repair, l: &layer{path: path, real: real, file: f, named: true}, r: &CheckResult{Filename: path, Problems: []Problem{}}}
	err = c.run()
	if e := f.Close(); err == nil {
		err = e
	}
	return c.r, err
}

type checker struct {
	ctx    context.Context
	o      ToolOptions
	repair bool
	l      *layer
	size   int64 // of the file
	short  error // the file ends inside the bitmap
	r      *CheckResult
}

func (c *checker) run() error {
	st, err := c.l.file.Stat()
	if err != nil {
		return err
	}
	c.size, c.l.id = st.Size, st.ID
	op := opener{o: c.o.Options, layers: []*layer{c.l}}
	op.o.ReadOnly, op.o.NoLock = true, true
	h, raw, err := op.probe(c.l, st.Size)
	var e *Error
	switch {
	case errors.Is(err, ErrNotCOW) || err != nil && !errors.As(err, &e):
		return err
	case err != nil:
		c.r.add(ProblemHeader, false, err, "%v", err)
		return nil
	}
	c.short = c.l.image(h, raw, st.Size, c.o.BitmapMemory)
	c.r.TotalSectors = h.Sectors()
	steps := []func() error{c.header, c.bitmap, c.bits, c.length, c.leaks, func() error { return c.backing(&op) }}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	if c.repair {
		return c.l.file.Sync()
	}
	return nil
}

func (c *checker) header() error {
	lay := &layouts[c.l.hdr.Variant]
	if !padsZero(c.l.raw, c.l.hdr.Variant) {
		for _, p := range lay.pads {
			if c.repair {
				clear(c.l.raw[p[0]:p[1]])
				if err := writeFull(c.l.file, c.l.raw[p[0]:p[1]], int64(p[0])); err != nil {
					return err
				}
			}
		}
		c.r.add(ProblemHeader, c.repair, nil, "bytes between the fields are not zero")
	}
	if len(c.l.hdr.Backing) >= lay.pathLen {
		c.r.add(ProblemHeader, false, nil, "the backing path fills its field without an end")
	}
	return nil
}

// bitmap checks that the bitmap is all there.
func (c *checker) bitmap() error {
	if c.short == nil {
		return nil
	}
	off, n := c.l.hdr.BitmapOffset(), c.l.hdr.BitmapBytes()
	had := c.size
	// What is missing says nothing; if what is there is empty, nothing was ever written and the rest can be put back.
	empty := true
	err := c.scan(off, c.size, func(b []byte, _ int64) bool {
		empty = isZero(b)
		return empty
	})
	if err != nil {
		return err
	}
	if empty && c.repair {
		if err := c.l.file.Truncate(c.l.hdr.freshBytes()); err != nil {
			return err
		}
		c.size = c.l.hdr.freshBytes()
		if err := c.l.image(c.l.hdr, c.l.raw, c.size, c.o.BitmapMemory); err != nil {
			return err
		}
	}
	c.r.add(ProblemBitmap, empty && c.repair, c.short, "the file has %d bytes, header and bitmap need %d", had, off+n)
	return nil
}

// scan reads the parts of [off, end) that are not holes.
func (c *checker) scan(off, end int64, f func(b []byte, off int64) bool) error {
	buf := getBuf()
	defer putBuf(buf)
	for off < end {
		s, e, err := c.l.file.NextData(off)
		if isEOF(err) {
			return nil
		}
		if err != nil {
			return err
		}
		s, e = max(s, off), min(e, end)
		for ; s < e; s += bufBytes {
			if err := c.ctx.Err(); err != nil {
				return err
			}
			b := buf[:min(e-s, bufBytes)]
			if err := readFull(c.l.file, b, s); err != nil {
				return err
			}
			if !f(b, s) {
				return nil
			}
		}
		off = max(e, off+1)
	}
	return nil
}

// bits checks what the bitmap says.
func (c *checker) bits() error {
	bm := c.l.bm
	if bm == nil {
		return nil
	}
	var err error
	if c.r.AllocatedSectors, err = bm.count(c.l.hdr.Sectors()); err != nil {
		return err
	}
	at, last, extra, err := c.l.bitsBeyondEnd()
	if err != nil {
		return err
	}
	if extra != 0 {
		if c.repair {
			if err := writeFull(c.l.file, []byte{last &^ extra}, at); err != nil {
				return err
			}
		}
		c.r.add(ProblemBeyondEnd, c.repair, nil, "bits are set after the last sector %d", c.l.hdr.Sectors()-1)
	}
	missing, err := c.l.lost(c.ctx, c.size)
	if err != nil {
		return err
	}
	if missing > 0 {
		c.r.add(ProblemDataMissing, false, nil, "the file ends at byte %d, before the data of %d allocated sectors; they read as zeros", c.size, missing)
	}
	return nil
}

// length checks for bytes after the last sector.
func (c *checker) length() error {
	end := c.l.data + c.l.size
	if st, err := c.l.file.Stat(); err != nil || c.size <= end || st.Device {
		return err
	}
	zero := true
	err := c.scan(end, c.size, func(b []byte, _ int64) bool {
		zero = isZero(b)
		return zero
	})
	if err != nil {
		return err
	}
	if c.repair && zero {
		if err := c.l.file.Truncate(end); err != nil {
			return err
		}
	}
	what := "with data: the size in the header may be wrong"
	if zero {
		what = "all zeros"
	}
	c.r.add(ProblemOversized, c.repair && zero, nil, "%d bytes after the last sector, %s", c.size-end, what)
	return nil
}

// leaks looks for data under clear bits.
func (c *checker) leaks() error {
	if c.l.bm == nil {
		return nil
	}
	end := min(c.size, c.l.data+c.l.size)
	for off := c.l.data; off < end; {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		s, e, err := c.l.file.NextData(off)
		if isEOF(err) {
			return nil
		}
		if err != nil {
			return err
		}
		// Only whole blocks of the file count: a block that is used in part cannot be given back.
		s, e = roundUp(max(s, c.l.data), unitSize), min(e, end)
		off = max(e, off+1)
		for s < e {
			first := (s - c.l.data) / sectorSize
			a, k, err := c.l.bm.run(first, (e-c.l.data+sectorSize-1)/sectorSize-first)
			if err != nil {
				return err
			}
			next := c.l.data + (first+k)*sectorSize
			if from, to := roundUp(s, unitSize), min(next, e)&^(unitSize-1); !a && to > from {
				c.r.LeakedBytes += to - from
				if c.repair {
					if err := c.l.file.PunchHole(from, to-from); err != nil && !errors.Is(err, errors.ErrUnsupported) {
						return err
					}
				}
			}
			s = next
		}
	}
	return nil
}

// backing checks the rest of the chain.
func (c *checker) backing(op *opener) error {
	err := op.addBacking(c.l)
	closeLayers(op.layers[1:])
	if err == nil {
		return nil
	}
	if ctxErr := c.ctx.Err(); ctxErr != nil {
		return ctxErr
	}
	c.r.add(ProblemBacking, false, err, "%v", err)
	return nil
}
