package delta

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/moovm/moovm/cowdisk"
)

// ErrSince says that an image does not stand on the one named.
var ErrSince = errors.New("the image does not stand on it")

// ExportOptions say what of an image is sent.
type ExportOptions struct {
	// Options open the image and what it stands on; they are read-only.
	cowdisk.Options
	// Since is the path of an image that the image stands on: only what lies
	// above it is sent. Empty sends all.
	Since string
	// From leaves out so many pieces at the beginning.
	From int64
	// Progress is told how many bytes of the disk were looked at; may be nil.
	Progress func(done, total int64)
}

// Export writes a stream of the image at path to w. The image must not be in
// use for writing: what a running machine writes is frozen first
// (cowdisk.Disk.Snapshot).
func Export(ctx context.Context, w io.Writer, path string, o ExportOptions) error {
	o.ReadOnly = true
	d, err := cowdisk.OpenAny(path, o.Options)
	if err != nil {
		return err
	}
	defer d.Close()
	h := Header{Size: d.Size(), From: o.From}
	depth := len(d.Layers()) // of the first layer that is not sent
	if o.Since != "" {
		if depth, h.Base, err = since(ctx, d, o); err != nil {
			return err
		}
	}
	if h.Source, err = source(d, h); err != nil {
		return err
	}
	out := bufio.NewWriterSize(w, 1<<20)
	s, err := newWriter(out, h)
	if err != nil {
		return err
	}
	defer s.enc.Close()
	if err := s.disk(ctx, d, depth, o); err != nil {
		return err
	}
	if again, err := source(d, h); err != nil || again != h.Source {
		return errors.Join(err, fmt.Errorf("%s: it, or what it stands on, changed meanwhile; begin again", path))
	}
	if err := s.end(); err != nil {
		return err
	}
	return out.Flush()
}

// since finds the layer that the stream stands on, and its digest.
func since(ctx context.Context, d *cowdisk.Disk, o ExportOptions) (depth int, digest string, err error) {
	want, err := cowdisk.HostFS{}.Resolve(o.Since)
	if err != nil {
		return 0, "", err
	}
	for i, l := range d.Layers() {
		if got, err := (cowdisk.HostFS{}).Resolve(l.Info().Filename); err != nil || got != want || i == 0 {
			continue
		}
		lower := o.Options
		lower.Backing, lower.BackingFormat, lower.Format = "", cowdisk.FormatUnknown, cowdisk.FormatRaw
		if l.Info().Format == "cow" {
			lower.Format = cowdisk.FormatCOW
		}
		base, err := cowdisk.OpenAny(o.Since, lower)
		if err != nil {
			return 0, "", err
		}
		defer base.Close()
		digest, err = Digest(ctx, base, o.Progress)
		return i, digest, err
	}
	return 0, "", fmt.Errorf("%s: %w: `moovm info --chain` lists what %s stands on", o.Since, ErrSince, d.Path())
}

// source identifies the files of a disk and their states.
func source(d *cowdisk.Disk, h Header) (string, error) {
	sum := sha256.New()
	fmt.Fprintln(sum, h.Size, h.Base)
	for _, l := range d.Layers() {
		st, err := os.Stat(l.Info().Filename)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(sum, st.Size(), st.ModTime().UnixNano())
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// disk writes what the layers above depth have.
func (w *writer) disk(ctx context.Context, d *cowdisk.Disk, depth int, o ExportOptions) error {
	buf := make([]byte, maxPiece)
	return d.Extents(ctx, 0, d.Size(), func(e cowdisk.Extent) error {
		if o.Progress != nil {
			o.Progress(e.Start, d.Size())
		}
		switch {
		case e.Depth >= depth, o.Since == "" && e.Zero:
			return nil
		case e.Zero:
			return w.piece(piece{kind: zero, offset: e.Start, length: e.Length}, nil)
		}
		for at := e.Start; at < e.Start+e.Length; {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			// Borders at multiples of the size: neighbours do not share a MiB.
			n := min(e.Start+e.Length, (at/maxPiece+1)*maxPiece) - at
			p := piece{kind: data, offset: at, length: n}
			if w.count >= w.skip {
				if _, err := d.ReadAt(buf[:n], at); err != nil {
					return err
				}
			}
			if err := w.piece(p, buf[:n]); err != nil {
				return err
			}
			at += n
		}
		return nil
	})
}
