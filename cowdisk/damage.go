package cowdisk

import (
	"context"
	"fmt"
	"math/bits"
)

// bitsBeyondEnd reads the bitmap's last byte, where the layout has bits for sectors that the disk does not have: at is where it lies in
// the file, extra which of these bits are set.
func (l *layer) bitsBeyondEnd() (at int64, last, extra byte, err error) {
	n := l.hdr.Sectors()
	if n >= l.bm.sectors() {
		return 0, 0, 0, nil
	}
	var b [1]byte // there are at most 7
	at = l.bm.offset + l.bm.bytes - 1
	err = readFull(l.file, b[:], at)
	return at, b[0], b[0] &^ (1<<(n%8) - 1), err
}

// lost counts the sectors whose data would lie beyond the end of the file, which has size bytes. It reads those parts of the bitmap in the
// file that are about them and no holes, and keeps none.
func (l *layer) lost(ctx context.Context, size int64) (lost int64, err error) {
	if size >= l.data+l.hdr.Size {
		return 0, nil
	}
	first, n := max(0, size-l.data)/sectorSize, min(l.hdr.Sectors(), l.bm.sectors())
	buf := getBuf()
	defer putBuf(buf)
	for off, end := l.bm.offset+first/8, l.bm.offset+(n+7)/8; off < end && ctx.Err() == nil; {
		s, e, err := l.file.NextData(off)
		if isEOF(err) {
			break
		}
		if err != nil {
			return 0, fmt.Errorf("%s: looking for holes in the bitmap: %w", l.path, err)
		}
		s = max(s, off)
		e = min(e, end, s+bufBytes)
		if off = max(e, off+1); s >= e {
			continue
		}
		b := buf[:e-s]
		if err := readFull(l.file, b, s); err != nil {
			return 0, fmt.Errorf("%s: reading the bitmap: %w", l.path, err)
		}
		if at := (s - l.bm.offset) * 8; at < first {
			b[0] &^= 1<<(first-at) - 1
		}
		if at := (e - l.bm.offset) * 8; at > n {
			b[len(b)-1] &= 1<<(8-(at-n)) - 1
		}
		if isZero(b) {
			continue
		}
		for _, c := range b {
			lost += int64(bits.OnesCount8(c))
		}
	}
	return lost, ctx.Err()
}

// intact refuses an image that lost its end. It reads the bitmap only where the file has no data for it.
func (l *layer) intact(ctx context.Context) error {
	if l.bm == nil {
		return nil
	}
	st, err := l.file.Stat()
	if err != nil {
		return err
	}
	lost, err := l.lost(ctx, st.Size)
	if err != nil || lost == 0 {
		return err
	}
	return &Error{Path: l.path, Field: "data", Kind: ErrDamaged, Detail: fmt.Sprintf("the file ends at byte %d, before the data of %d allocated sectors", st.Size, lost), Remedy: "restore it from a copy; what is missing would read as zeros"}
}

// sound refuses to let a tool work with images in which Check finds damage: all of every bitmap can be read, no bit lies beyond the disk,
// no data beyond the file.
func sound(ctx context.Context, layers []*layer, o *ToolOptions) error {
	if o.AllowDamage {
		return nil
	}
	for _, l := range layers {
		if l.bm == nil {
			continue
		}
		if _, err := l.bm.count(l.hdr.Sectors()); err != nil {
			return err
		}
		if err := l.intact(ctx); err != nil {
			return err
		}
		_, _, extra, err := l.bitsBeyondEnd()
		if err != nil {
			return err
		}
		if extra != 0 {
			return &Error{Path: l.path, Field: "bitmap", Kind: ErrDamaged, Detail: fmt.Sprintf("bits are set after the last sector %d", l.hdr.Sectors()-1), Remedy: "look at it with check, which can repair that"}
		}
	}
	return nil
}

// unchanged reports what a program that minds no locks has done to backing files while a tool read them.
func unchanged(layers []*layer) error {
	for _, l := range layers {
		st, err := l.file.Stat()
		if err != nil {
			return err
		}
		if !st.ModTime.Equal(l.seen.ModTime) || st.Size != l.seen.Size {
			return &Error{Path: l.path, Kind: ErrStaleBacking, Detail: "it changed while it was read", Remedy: "stop the program that writes to it, and start again"}
		}
	}
	return nil
}
