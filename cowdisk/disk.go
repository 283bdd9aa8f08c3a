package cowdisk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

// Disk is an open image with its chain of backing files: a disk that a guest reads and writes. All methods may be called from any number
// of goroutines. Where reads and writes overlap in time, each sector is old or new.
type Disk struct {
	path     string
	readOnly bool
	size     int64
	fs       FS
	memory   int64 // Options.BitmapMemory
	gate     gate
	closing  sync.Once
	chain    *chain // changes only while the gate is paused
	locks    rangeLock

	written atomic.Bool // something was written since the last flush began
	flush   flusher
	failed  atomic.Pointer[failure]
	noPunch atomic.Bool
	noZero  atomic.Bool

	copyUps, syncs atomic.Uint64
}

// failure is the first error that may have lost data. It is sticky.
type failure struct {
	err  error
	sync bool // a sync failed: nothing is known about what is on disk, so no bit may be written any more
}

func (d *Disk) fail(err error, sync bool) {
	f := &failure{err: err, sync: sync}
	for {
		old := d.failed.Load()
		if old != nil && (old.sync || !sync) {
			return
		}
		if old != nil {
			f.err = old.err
		}
		if d.failed.CompareAndSwap(old, f) {
			if bm := d.chain.layers[0].bm; bm != nil {
				bm.failed(sync)
			}
			return
		}
	}
}

// failWrite remembers a failed write, so that Flush reports it.
func (d *Disk) failWrite(err error) {
	if !errors.Is(err, ErrNoBit) { // nothing was tried
		d.fail(err, false)
	}
}

func (d *Disk) failure() error {
	if f := d.failed.Load(); f != nil {
		return &Error{Path: d.path, Kind: ErrFailed, Err: f.err, Remedy: "fix the cause and open the image again; what was flushed before is safe"}
	}
	return nil
}

// Size is the size of the disk in bytes, a multiple of 512.
func (d *Disk) Size() int64 { return d.size }

// ReadOnly reports whether writes are refused.
func (d *Disk) ReadOnly() bool { return d.readOnly }

// Path is the path the disk was opened with.
func (d *Disk) Path() string { return d.path }

// check validates a request; write says that it changes the disk.
func (d *Disk) check(off, n int64, write bool) error {
	if off < 0 || n < 0 || off > d.size || n > d.size-off {
		return &Error{Path: d.path, Kind: ErrRange, Detail: fmt.Sprintf("offset %d, %d bytes, disk of %d bytes", off, n, d.size)}
	}
	if write && d.readOnly {
		return &Error{Path: d.path, Kind: ErrReadOnly, Detail: "it was opened read-only"}
	}
	return nil
}

// begin admits a request of n > 0 bytes, which ends with Add(-1) on what it returns; nil when there is nothing to do.
func (d *Disk) begin(off, n int64, write bool) (*atomic.Int64, error) {
	if err := d.check(off, n, write); err != nil || n == 0 {
		return nil, err
	}
	g, ok := d.gate.enter(off >> 12)
	if !ok {
		return nil, d.errClosed()
	}
	return g, nil
}

func (d *Disk) errClosed() error { return &Error{Path: d.path, Kind: ErrClosed} }

// ReadAt fills p from the disk, as io.ReaderAt says: at the end of the disk it is short, with io.EOF.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > d.size {
		return 0, d.check(off, int64(len(p)), false)
	}
	eof := false
	if int64(len(p)) > d.size-off {
		p, eof = p[:d.size-off], true
	}
	if len(p) > 0 {
		g, ok := d.gate.enter(off >> 12)
		if !ok {
			return 0, d.errClosed()
		}
		defer g.Add(-1) // p may be memory that faults
		if err := d.chain.read(p, off); err != nil {
			return 0, err
		}
	}
	if eof {
		return len(p), io.EOF
	}
	return len(p), nil
}

// ReadvAt fills all of bufs from consecutive bytes of the disk. A request beyond the end of the disk is ErrRange and reads nothing.
func (d *Disk) ReadvAt(bufs [][]byte, off int64) (int, error) {
	n := totalLen(bufs)
	g, err := d.begin(off, n, false)
	if g == nil {
		return 0, err
	}
	defer g.Add(-1)
	if err := d.chain.readv(bufs, off, n); err != nil {
		return 0, err
	}
	return int(n), nil
}

// Close waits for what is under way, flushes, and releases the files and their locks. It waits as long as the host takes: CloseContext
// gives up. The second Close does nothing but wait for the first.
func (d *Disk) Close() (err error) {
	d.closing.Do(func() {
		d.gate.close()
		if !d.readOnly {
			err = d.flush.run(d.flushPass)
		}
		err = errors.Join(err, closeLayers(d.chain.layers))
	})
	return err
}

// CloseContext is Close for who cannot wait for a host that hangs: when ctx ends first, it returns ErrBusy. The disk is closed to new
// operations then, and its files and locks go when what hangs has ended, or the process has. What was flushed before is safe; of the rest
// the image has what it would have after a power failure.
func (d *Disk) CloseContext(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- d.Close() }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return &Error{Path: d.path, Kind: ErrBusy, Detail: context.Cause(ctx).Error()}
	}
}

func closeLayers(layers []*layer) (err error) {
	for _, l := range layers {
		if e := l.file.Close(); e != nil && err == nil {
			err = e
		}
	}
	return err
}

// Stats are counters since Open.
type Stats struct {
	CopyUps uint64 // units of which a part was copied from a lower layer
	Syncs   uint64 // fdatasync calls
}

// Stats may be called at any time.
func (d *Disk) Stats() Stats {
	return Stats{CopyUps: d.copyUps.Load(), Syncs: d.syncs.Load()}
}
