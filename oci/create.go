package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/moovm/moovm/internal/ext4"
)

// CreateOptions say what disk is made of an image.
type CreateOptions struct {
	// Size of the disk in bytes; 0 = what the image needs and at least half of
	// it, and 4 GiB, more. Disks are sparse.
	Size int64
	// Limits bound what the image may be.
	Limits Limits
	// Blobs is a folder where layers from registries are kept, by digest; "" = nowhere.
	Blobs string
	// Progress is told of the bytes of the layers that came; total is 0 if
	// nobody knows. It is called by one goroutine at a time.
	Progress func(done, total int64)
}

// defaultFree is what is free on a disk whose size nobody chose.
const defaultFree = 4 << 30

// Create makes the disk of the image at path, where nothing may be yet. It
// appears there when it is complete and on disk. Its modification time is the
// image's, so that overlays of it fit to one made later, too.
//
// Errors: *LayerError, ErrTooLarge, fs.ErrExist, those of the file system.
func (m *Image) Create(ctx context.Context, path string, o CreateOptions) error {
	if _, err := os.Lstat(path); err == nil {
		return &os.PathError{Op: "create", Path: path, Err: os.ErrExist}
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".moovm-root-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := m.write(ctx, f, o); err != nil {
		return err
	}
	if err := errors.Join(f.Chmod(0o444), f.Sync(), f.Close()); err != nil {
		return err
	}
	when := m.Created
	if when.Unix() < 2 { // 0 would mean to overlays that nobody knows
		when = time.Unix(1_000_000_000, 0)
	}
	if err := os.Chtimes(f.Name(), when, when); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err = os.Link(f.Name(), path)                                                  // which replaces nothing
	if errors.Is(err, errors.ErrUnsupported) || errors.Is(err, os.ErrPermission) { // not every file system has links
		err = os.Rename(f.Name(), path)
	}
	return err
}

// write makes the disk in f, which is empty.
func (m *Image) write(ctx context.Context, f *os.File, o CreateOptions) error {
	o.Limits.setDefaults()
	w, err := ext4.New(f, ext4.Options{
		Size: o.Size, MinFree: defaultFree, Limit: o.Limits.Bytes + o.Limits.Bytes/2 + 8<<30, MaxInodes: o.Limits.Files + 1,
		ID: m.Digest, Time: m.Created, Punch: punch(f),
	})
	if err != nil {
		return err
	}
	u := newUnpacker(w, o.Limits, m.Created)
	if err := w.SetAttr(w.Root(), u.implied); err != nil {
		return err
	}
	if err := m.unpack(ctx, u, o); err != nil {
		return err
	}
	if parts, err := split(m.Config.WorkingDir); err == nil { // docker makes it, too
		u.fresh = map[place]bool{}
		if _, err := u.resolve(parts, true); err != nil && !errors.Is(err, ErrEntry) && !errors.Is(err, ErrUnsafe) {
			return err
		}
	}
	size, err := w.Finish()
	if err != nil {
		return err
	}
	return f.Truncate(max(size, o.Size))
}

// unpack puts all layers into the file system, as they arrive.
func (m *Image) unpack(parent context.Context, u *unpacker, o CreateOptions) error {
	ctx, cancel := context.WithCancelCause(parent)
	var mu sync.Mutex
	var done int64
	got := func(n int64) {
		if o.Progress == nil || n == 0 {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		done += n
		o.Progress(done, max(m.Size(), done))
	}
	downloads := make([]*download, len(m.layers))
	for i, l := range m.layers {
		if !l.remote {
			continue
		}
		d := &download{layer: l}
		d.grown.L = &d.mu
		if o.Blobs != "" {
			d.kept = filepath.Join(o.Blobs, cacheName(l.digest))
		}
		downloads[i] = d
		defer d.remove()
	}
	wait := fetchAll(ctx, cancel, downloads, m, got)
	defer wait()
	defer cancel(errStop)
	for i, l := range m.layers {
		path, err := m.unpackOne(ctx, u, l, downloads[i], cancel, got)
		if err == nil {
			continue
		}
		if ctx.Err() != nil { // what another layer, or the caller, ended
			if cause := context.Cause(ctx); !errors.Is(cause, errStop) {
				err = cause
			}
		}
		if parent.Err() != nil {
			return context.Cause(parent)
		}
		if le := (*LayerError)(nil); errors.As(err, &le) {
			return err
		}
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("it is cut off: %w", err)
		}
		return &LayerError{Index: i + 1, Count: len(m.layers), Digest: l.digest, Path: strings.ToValidUTF8(path, "?"), Err: err}
	}
	return nil
}

func (m *Image) unpackOne(ctx context.Context, u *unpacker, l layer, d *download, cancel context.CancelCauseFunc, got func(int64)) (string, error) {
	stop := func() {}
	var r io.Reader
	if d != nil {
		stop = func() { cancel(errStop) }
		var err error
		if r, err = d.reader(ctx); err != nil {
			return "", err
		}
	} else {
		local, err := l.open(ctx)
		if err != nil {
			return "", err
		}
		defer local.Close()
		r = &counting{local, got}
	}
	path, err := u.layer(ctx, r, stop)
	if d != nil && err != nil && (ctx.Err() == nil || errors.Is(context.Cause(ctx), errStop)) && d.forget() {
		err = fmt.Errorf("%w (it was in the cache, where it may have been damaged; it is fetched anew the next time)", err)
	}
	return path, err
}

// counting tells how much was read.
type counting struct {
	r   io.Reader
	got func(int64)
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.got(int64(n))
	return n, err
}
