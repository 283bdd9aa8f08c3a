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
)

// download is a layer on its way into a file, which is read while it grows.
type download struct {
	layer layer
	kept  string // where the cache keeps it; "" = nowhere

	mu    sync.Mutex
	grown sync.Cond
	f     *os.File // nil before it began
	old   bool     // it was in the cache, and is checked when it is read
	n     int64
	err   error // io.EOF: it is whole, and what it should be
}

// fetchers is how many layers are fetched at the same time.
const fetchers = 3

// fetch fetches the layer. got is told of every piece.
func (d *download) fetch(ctx context.Context, stall time.Duration, temp string, got func(n int64)) {
	err := d.copy(ctx, stall, temp, got)
	if err == nil {
		err = io.EOF
	}
	d.mu.Lock()
	d.err = err
	d.mu.Unlock()
	d.grown.Broadcast()
}

func (d *download) copy(ctx context.Context, stall time.Duration, temp string, got func(n int64)) (err error) {
	if d.kept != "" {
		if f, err := os.Open(d.kept); err == nil {
			st, err := f.Stat()
			if err == nil && (d.layer.size < 0 || st.Size() == d.layer.size) {
				touch(d.kept)
				d.mu.Lock()
				d.old = true
				d.mu.Unlock()
				d.grow(f, st.Size())
				got(st.Size())
				return nil
			}
			f.Close()
		}
		temp = filepath.Dir(d.kept)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(stall, func() { cancel(fmt.Errorf("%w for %v", ErrStalled, stall)) })
	defer watch.Stop()
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}()
	r, err := d.layer.open(ctx)
	if err != nil {
		return err
	}
	defer r.Close()
	defer context.AfterFunc(ctx, func() { r.Close() })()
	f, err := os.CreateTemp(temp, "moovm-layer-*")
	if err != nil {
		return err
	}
	d.grow(f, 0)
	buf := make([]byte, 256<<10)
	for {
		n, err := r.Read(buf)
		watch.Reset(stall)
		if n > 0 {
			if _, err := f.Write(buf[:n]); err != nil {
				return err
			}
			d.grow(f, int64(n))
			got(int64(n))
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	if d.kept != "" {
		return os.Rename(f.Name(), d.kept)
	}
	return nil
}

func (d *download) grow(f *os.File, n int64) {
	d.mu.Lock()
	d.f = f
	d.n += n
	d.mu.Unlock()
	d.grown.Broadcast()
}

// wait waits until there are bytes at off, or no more will come.
func (d *download) wait(ctx context.Context, off int64) (f *os.File, n int64, err error) {
	defer context.AfterFunc(ctx, func() {
		d.mu.Lock() // not between the look at ctx and the wait
		defer d.mu.Unlock()
		d.grown.Broadcast()
	})()
	d.mu.Lock()
	defer d.mu.Unlock()
	for d.n <= off && d.err == nil && ctx.Err() == nil {
		d.grown.Wait()
	}
	switch {
	case ctx.Err() != nil:
		return nil, 0, context.Cause(ctx)
	case d.err != nil && d.err != io.EOF:
		return nil, 0, d.err
	case d.n > off:
		return d.f, d.n - off, nil
	}
	return nil, 0, d.err
}

// remove closes the file, and takes it away if nobody keeps it.
func (d *download) remove() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.f == nil {
		return
	}
	d.f.Close()
	if d.kept == "" || d.err != io.EOF && d.f.Name() != d.kept {
		os.Remove(d.f.Name())
	}
}

// arriving reads a download.
type arriving struct {
	ctx context.Context
	d   *download
	off int64
}

// reader reads the download as it arrives. One that was in the cache is checked
// now, one that comes over the network was checked on its way.
func (d *download) reader(ctx context.Context) (io.Reader, error) {
	if _, _, err := d.wait(ctx, 0); err != nil && err != io.EOF {
		return nil, err
	}
	a := &arriving{ctx: ctx, d: d}
	d.mu.Lock()
	old := d.old
	d.mu.Unlock()
	if !old {
		return a, nil
	}
	return verified(a, d.layer.digest, d.layer.size)
}

func (a *arriving) Read(p []byte) (int, error) {
	f, n, err := a.d.wait(a.ctx, a.off)
	if err != nil {
		return 0, err
	}
	k, err := f.ReadAt(p[:min(int64(len(p)), n)], a.off)
	a.off += int64(k)
	if k > 0 {
		err = nil
	}
	return k, err
}

// forget takes a blob that turned out to be no good out of the cache, if it
// was there.
func (d *download) forget() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.old && os.Remove(d.kept) == nil
}

// fetchAll fetches layers in their order, some at a time. The first that fails
// ends ctx with its error.
func fetchAll(ctx context.Context, cancel context.CancelCauseFunc, ds []*download, m *Image, got func(int64)) (wait func()) {
	var all sync.WaitGroup
	places := make(chan struct{}, fetchers)
	all.Go(func() {
		for i, d := range ds {
			if d == nil {
				continue
			}
			select {
			case places <- struct{}{}:
			case <-ctx.Done():
			}
			all.Go(func() {
				if ctx.Err() != nil {
					d.mu.Lock()
					d.err = context.Cause(ctx)
					d.mu.Unlock()
					d.grown.Broadcast()
					return
				}
				d.fetch(ctx, m.stall, m.temp, got)
				if !errors.Is(d.err, io.EOF) {
					cancel(&LayerError{Index: i + 1, Count: len(m.layers), Digest: d.layer.digest, Err: d.err})
				}
				<-places
			})
		}
	})
	return all.Wait
}

// cacheName is the file of a blob in a cache.
func cacheName(digest string) string { return strings.Replace(digest, ":", "-", 1) }

// touch says that a file of the cache is in use. Once a day is enough.
func touch(name string) {
	now := time.Now()
	if st, err := os.Stat(name); err == nil && now.Sub(st.ModTime()) > 24*time.Hour {
		_ = os.Chtimes(name, now, now)
	}
}
