package cowdisk

import "context"

// Rebase makes backing the backing file of the image at path ("" = none). The contents of the disk stay what they are: where the new
// backing file differs from the old one, the old contents are copied into the image first. A crash on the way leaves an image with the
// same contents; running Rebase again completes it. backing is trusted; a relative path starts at the image's folder. o.OtherFormat is
// what it is, as in [CreateOptions].BackingFormat.
func Rebase(ctx context.Context, path, backing string, o ToolOptions) error {
	o.ReadOnly = false
	d, err := Open(path, o.Options)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := sound(ctx, d.chain.layers, &o); err != nil {
		return err
	}
	top := d.chain.layers[0]
	h, base, err := rebasedHeader(top, backing, o.OtherFormat, o.Options, false)
	defer base.close()
	if err != nil {
		return err
	}
	below := newChain(nil)
	if !standalone(h.Backing) {
		op := opener{o: o.Options}
		op.o.ReadOnly, op.o.Backing = true, ""
		defer func() { closeLayers(op.layers) }()
		if err := op.openBase(backingPath(top.real, h.Backing), h.BackingFormat, top); err != nil {
			return err
		}
		if err := sound(ctx, op.layers, &o); err != nil {
			return err
		}
		below = newChain(op.layers)
	}
	p := &progress{ctx: ctx, f: o.Progress, total: d.size}
	old := newChain(d.chain.layers[1:])
	for off := int64(0); off < d.size; {
		owner, n, err := d.chain.find(off, min(d.size-off, dirSectors*sectorSize))
		if err != nil {
			return err
		}
		if owner == 0 {
			if err := p.add(n); err != nil {
				return err
			}
			off += n
			continue
		}
		if err := d.keepOld(old, below, off, n, p); err != nil {
			return err
		}
		off += n
	}
	if err := d.Flush(); err != nil {
		return err
	}
	for _, c := range []*chain{old, below} {
		if err := unchanged(c.layers); err != nil {
			return err
		}
	}
	return top.switchHeader(h)
}

// keepOld copies up those units of [off, off+n) in which the new chain differs from the old one.
func (d *Disk) keepOld(old, below *chain, off, n int64, p *progress) error {
	buf := getBuf()
	defer putBuf(buf)
	for end := off + n; off < end; {
		at, err := firstDifference(old, below, off, end-off, p)
		if err != nil || at < 0 {
			return err
		}
		at &^= unitSize - 1
		k := min(unitSize, d.size-at)
		if err := d.chain.readBelow(0, buf[:k], at); err != nil {
			return err
		}
		if _, err := d.WriteAt(buf[:k], at); err != nil {
			return err
		}
		off = at + k
	}
	return nil
}

// openBase opens a backing file that the caller named for the image top.
func (op *opener) openBase(path string, format Format, top *layer) error {
	real, err := op.o.fs().Resolve(path)
	if err != nil {
		return err
	}
	if real == top.real {
		return loopError(top, path)
	}
	f, err := op.o.fs().Open(real, op.o.mode(false))
	if err != nil {
		return renamed(err, real, path)
	}
	if err := op.add(path, real, f, format, true); err != nil {
		return err
	}
	for _, l := range op.layers {
		if l.real == top.real || l.id == top.id && l.id != (FileID{}) {
			return loopError(top, path)
		}
	}
	return nil
}

// RebaseHeader changes only what the header says about the backing file: its path, size and time. The contents of the disk are then
// whatever the new backing file makes of them. Use it when a backing file was moved, or to accept one that changed.
func RebaseHeader(path, backing string, o ToolOptions) error {
	o.ReadOnly = false
	op := opener{o: o.Options, topOnly: true}
	defer func() { closeLayers(op.layers) }()
	if err := op.open(path, FormatCOW); err != nil {
		return err
	}
	h, base, err := rebasedHeader(op.layers[0], backing, o.OtherFormat, o.Options, o.AllowMissingBacking)
	defer base.close()
	if err != nil {
		return err
	}
	return op.layers[0].switchHeader(h)
}

// rebasedHeader is l's header with another backing file, which stays locked until base is closed.
func rebasedHeader(l *layer, backing string, format Format, o Options, missing bool) (h Header, base backingInfo, err error) {
	h = l.hdr
	if backing != "" {
		base, err = inspectBacking(o, l, backing, format)
		if err != nil && !(missing && isMissing(err)) {
			return h, base, err
		}
	}
	return h, base, h.setBacking(l.path, l.real, backing, base)
}
