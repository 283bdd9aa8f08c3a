package cowdisk

import "context"

// Extent is a run of bytes of the disk that all come from the same place.
type Extent struct {
	Start    int64  `json:"start"`
	Length   int64  `json:"length"`
	Depth    int    `json:"depth"`            // the layer, 0 = the image itself; the last layer when no layer has it
	Present  bool   `json:"present"`          // some layer has it
	Zero     bool   `json:"zero"`             // known to read as zeros
	Data     bool   `json:"data"`             // takes up space in the layer's file
	Offset   *int64 `json:"offset,omitempty"` // in the layer's file
	Filename string `json:"filename,omitempty"`
}

// Extents calls yield for each extent of n bytes at off, in order. Neighbours of the same kind are one extent. It ends early with the
// error of yield or ctx. Beyond the end of the disk: ErrRange.
func (d *Disk) Extents(ctx context.Context, off, n int64, yield func(Extent) error) error {
	if err := d.check(off, n, false); err != nil {
		return err
	}
	return d.top().Extents(ctx, off, n, yield)
}

// Extents is like Disk.Extents for the disk that this layer and those below it make up; depth counts from this layer.
func (l Layer) Extents(ctx context.Context, off, n int64, yield func(Extent) error) error {
	if l.d == nil || off < 0 || n < 0 || off > l.Size() || n > l.Size()-off {
		return &Error{Path: l.c.layers[0].path, Kind: ErrRange}
	}
	var last Extent
	have := false
	emit := func(e Extent) error {
		if have && last.Depth == e.Depth && last.Present == e.Present && last.Zero == e.Zero && last.Data == e.Data {
			last.Length += e.Length
			return nil
		}
		if have {
			if err := yield(last); err != nil {
				return err
			}
		}
		last, have = e, true
		return nil
	}
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		var e Extent
		var err error
		if !l.do(func() { e, err = l.c.extent(off, min(n, dirSectors*sectorSize)) }) {
			return l.d.errClosed()
		}
		if err != nil {
			return err
		}
		off, n = off+e.Length, n-e.Length
		if err := emit(e); err != nil {
			return err
		}
	}
	if have {
		return yield(last)
	}
	return nil
}

// extent describes the run at off, at most n bytes of it.
func (c *chain) extent(off, n int64) (Extent, error) {
	owner, n, err := c.find(off, n)
	if err != nil {
		return Extent{}, err
	}
	e := Extent{Start: off, Length: n, Depth: owner, Present: true}
	if owner < 0 {
		e.Depth, e.Present, e.Zero = len(c.layers)-1, false, true
		return e, nil
	}
	l := c.layers[owner]
	pos := l.data + off
	e.Offset, e.Filename = &pos, l.path
	start, end, err := l.file.NextData(pos)
	switch {
	case isEOF(err) || err == nil && start >= pos+n:
		e.Zero = true
	case err != nil:
		return Extent{}, err
	case start > pos:
		e.Length, e.Zero = start-pos, true
	default:
		e.Length, e.Data = min(n, end-pos), true
	}
	return e, nil
}
