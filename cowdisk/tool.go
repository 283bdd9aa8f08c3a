package cowdisk

import (
	"bytes"
	"context"
	"encoding/binary"
)

// ToolOptions are what all maintenance functions take: how to open the image and its backing files, and whom to tell how far it is.
type ToolOptions struct {
	Options
	// Progress, if not nil, is called now and then with bytes done and to do.
	Progress func(done, total int64)
	// OtherFormat is the Format of the second file a tool takes: Compare's other disk, the new backing file of Rebase and RebaseHeader.
	OtherFormat Format
}

// progress counts bytes and looks at the context.
type progress struct {
	ctx         context.Context
	f           func(done, total int64)
	done, total int64
}

func (p *progress) add(n int64) error {
	p.done += n
	if p.f != nil {
		p.f(min(p.done, p.total), p.total)
	}
	return p.ctx.Err()
}

// rewriteHeader writes the header fields of l and syncs them. A torn write can only tear what differs from before.
func (l *layer) rewriteHeader(h Header) error {
	b := bytes.Clone(l.raw)
	h.encode(b)
	if !bytes.Equal(b, l.raw) {
		if err := writeFull(l.file, b, 0); err != nil {
			return err
		}
		if err := l.file.Sync(); err != nil {
			return err
		}
	}
	l.raw, l.hdr = b, h
	return nil
}

// switchHeader changes what the header says about the backing file so that a crash leaves an image that opens: while path and size may
// not fit together the time is 0, which means unknown.
func (l *layer) switchHeader(h Header) error {
	for _, step := range []struct {
		h     Header
		mtime uint32
	}{{l.hdr, 0}, {h, 0}, {h, h.MTime}} {
		step.h.MTime = step.mtime
		if err := l.rewriteHeader(step.h); err != nil {
			return err
		}
	}
	return nil
}

// isZero reports whether b holds only zeros.
func isZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// copyNonZero copies n bytes at off of src to dst, leaving out allocation units that are zero; dst reads as zeros there already.
func copyNonZero(src *chain, dst *Disk, off, n int64, p *progress) error {
	buf := getBuf()
	defer putBuf(buf)
	for n > 0 {
		b := buf[:min(n, bufBytes-off%unitSize)]
		if err := src.readBelow(0, b, off); err != nil {
			return err
		}
		for i := 0; i < len(b); {
			end := i
			step := func(at int) int { return min(at+unitSize-int((off+int64(at))%unitSize), len(b)) }
			for end < len(b) && !isZero(b[end:step(end)]) {
				end = step(end)
			}
			if end > i {
				if _, err := dst.WriteAt(b[i:end], off+int64(i)); err != nil {
					return err
				}
				i = end
			} else {
				i = step(i)
			}
		}
		off, n = off+int64(len(b)), n-int64(len(b))
		if err := p.add(int64(len(b))); err != nil {
			return err
		}
	}
	return nil
}
