package cowdisk

import (
	"context"
	"errors"
	"time"
)

func isMissing(err error) bool { return errors.Is(err, ErrBackingMissing) }

// ErrNoBacking: the image has no backing file to commit to.
var ErrNoBacking = errors.New("no backing file")

// Commit writes what is in the overlay into its backing file, which grows to the size of the disk if it is shorter, and empties the
// overlay. Its contents never change. A crash on the way leaves an overlay with the same contents over a backing file that is partly
// updated; running Commit again completes it. Other overlays of the backing file become stale: its modification time is in a later second,
// on disk, before its contents change, for which Commit waits if it was modified within the present second. The backing file must not be
// in use (ErrLocked).
func Commit(ctx context.Context, path string, o ToolOptions) error {
	o.ReadOnly = false
	op, err := openCommit(path, o)
	if err != nil {
		return err
	}
	defer func() { closeLayers(op.layers) }()
	over, base := op.layers[0], op.layers[1]
	if err := sound(ctx, op.layers, &o); err != nil {
		return err
	}
	if base.bm == nil {
		if err := refuseHeaderInRaw(over, base); err != nil {
			return err
		}
	}
	// From here on the base is no longer what the header says; the overlay hides the difference.
	if err := over.rewriteHeader(unknownTime(over.hdr)); err != nil {
		return err
	}
	if base.bm != nil && base.size < over.size {
		if base, err = op.growBase(ctx, o); err != nil {
			return err
		}
	}
	if err := base.age(ctx); err != nil {
		return err
	}
	if base.bm == nil && base.size < over.hdr.Size {
		if err := base.file.Truncate(over.hdr.Size); err != nil {
			return err
		}
		base.size = over.hdr.Size
	}
	dst := newDisk(base.path, op.layers[1:], false)
	if err := commitData(ctx, over, dst, o); err != nil {
		return err
	}
	dst.wrote()
	if err := dst.Flush(); err != nil {
		return err
	}
	if err := over.empty(); err != nil {
		return err
	}
	return over.accept(base)
}

// growBase makes the image below the top as large as the disk: written anew, in the place of the old one. The locks of both are held until
// the new one has the name, and that of the new one from then on.
func (op *opener) growBase(ctx context.Context, o ToolOptions) (*layer, error) {
	old := op.layers[1]
	d := newDisk(old.path, op.layers[1:], false)
	h, err := d.resizedHeader(op.layers[0].size)
	if err != nil {
		return nil, err
	}
	o.Progress = nil
	l, err := d.resized(ctx, h, o)
	if err != nil {
		return nil, err
	}
	op.layers[1] = l
	return l, old.file.Close()
}

// futureSkew is how far ahead of the present a modification time may lie for age to wait for it.
const futureSkew = 2 * time.Second

// age gives l's file a modification time in a later second than the one that overlays know, durably, before its contents change. Every
// write makes the time the present again, so it is the present that must have come to a later second: headers store whole ones, and after
// a crash the time may be that of any write. A time further ahead than futureSkew is not waited for: the present differs from it.
func (l *layer) age(ctx context.Context) error {
	before, err := l.file.Stat()
	if err != nil || before.ModTime.IsZero() {
		return err
	}
	for {
		if err := l.file.Touch(); err != nil {
			return err
		}
		now, err := l.file.Stat()
		if err != nil {
			return err
		}
		if ahead := before.ModTime.Unix() - now.ModTime.Unix(); ahead < 0 || ahead > int64(futureSkew/time.Second) {
			return l.file.SyncAll()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// accept makes l's header say that base is as it is now. The time that it records is on disk before.
func (l *layer) accept(base *layer) error {
	if err := base.file.SyncAll(); err != nil {
		return err
	}
	st, err := base.file.Stat()
	if err != nil {
		return err
	}
	h := l.hdr
	if err := h.setBacking(l.path, l.real, h.Backing, base.asBacking(st.mtime32())); err != nil {
		return err
	}
	return l.switchHeader(h)
}

func openCommit(path string, o ToolOptions) (*opener, error) {
	op := &opener{o: o.Options, writeBase: true}
	err := op.open(path, FormatCOW)
	if err == nil && len(op.layers) < 2 {
		err = &Error{Path: path, Kind: ErrNoBacking, Remedy: "flatten it instead"}
		if !standalone(op.layers[0].hdr.Backing) {
			err = &Error{Path: path, Field: "backing file", Kind: ErrBackingMissing, Detail: op.layers[0].hdr.Backing, Remedy: "put it back first"}
		}
	}
	if err == nil && op.layers[1].bm != nil && layouts[op.layers[1].hdr.Variant].readOnly {
		err = &Error{Path: op.layers[1].path, Field: "layout", Kind: ErrVariant, Detail: op.layers[1].hdr.Variant.String() + " is read-only", Remedy: "flatten it to a v2 or v3 image"}
	}
	if err != nil {
		closeLayers(op.layers)
		return nil, err
	}
	return op, nil
}

func unknownTime(h Header) Header {
	h.MTime = 0
	return h
}

// refuseHeaderInRaw keeps a guest from turning a raw base into a COW image that names any file it likes as its backing file.
func refuseHeaderInRaw(over, base *layer) error {
	a, _, err := over.bm.run(0, 1)
	if err != nil || !a {
		return err
	}
	var b [4]byte
	if err := readFull(over.file, b[:], over.data); err != nil {
		return err
	}
	if isCOW(b[:]) {
		return &Error{Path: base.path, Field: "first sector", Kind: ErrHeader, Detail: "the guest wrote the magic of a COW image there", Remedy: "flatten the overlay to a v2 or v3 image instead"}
	}
	return nil
}

// commitData copies what over has to dst; holes become holes.
func commitData(ctx context.Context, over *layer, dst *Disk, o ToolOptions) error {
	own := newChain([]*layer{over})
	end := min(over.size, dst.size)
	n, err := over.bm.count(end / sectorSize)
	if err != nil {
		return err
	}
	p := &progress{ctx: ctx, f: o.Progress, total: n * sectorSize}
	buf := getBuf()
	defer putBuf(buf)
	for off := int64(0); off < end; {
		e, err := own.extent(off, min(end-off, dirSectors*sectorSize))
		if err != nil {
			return err
		}
		next := off + e.Length
		switch {
		case !e.Present:
			err = ctx.Err()
		case e.Zero:
			if err = dst.WriteZeroes(off, e.Length, true); err == nil {
				err = p.add(e.Length)
			}
		default:
			for off < next && err == nil {
				b := buf[:min(next-off, bufBytes)]
				if err = readFull(over.file, b, over.data+off); err == nil {
					_, err = dst.WriteAt(b, off)
				}
				off += int64(len(b))
				if err == nil {
					err = p.add(int64(len(b)))
				}
			}
		}
		if err != nil {
			return err
		}
		off = next
	}
	return nil
}

// empty makes an overlay whose contents are in its base a fresh one: first the bits go, then the data.
func (l *layer) empty() error {
	for off := int64(0); off < l.bm.bytes; {
		start, end, err := l.file.NextData(l.bm.offset + off)
		if isEOF(err) {
			break
		}
		if err != nil {
			return err
		}
		off = max(start-l.bm.offset, off)
		for end = min(end-l.bm.offset, l.bm.bytes); off < end; {
			k := min(end-off, bufBytes)
			if err := writeFull(l.file, zeros[:k], l.bm.offset+off); err != nil {
				return err
			}
			off += k
		}
	}
	if err := l.file.Sync(); err != nil {
		return err
	}
	if err := l.file.Truncate(l.bm.offset + l.bm.bytes); err != nil {
		return err
	}
	if err := l.file.Truncate(l.hdr.freshBytes()); err != nil {
		return err
	}
	return l.file.Sync()
}
