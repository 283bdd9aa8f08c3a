package cowdisk

import "sync"

// flusher lets one pass serve every flush that was waiting when it began.
type flusher struct {
	mu      sync.Mutex
	cond    sync.Cond
	begun   uint64 // passes
	done    uint64
	running bool
	err     error // of the last pass
}

// run returns after a pass that began after run was called.
func (f *flusher) run(pass func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cond.L == nil {
		f.cond.L = &f.mu
	}
	want := f.begun + 1
	for f.running && f.done < want {
		f.cond.Wait()
	}
	if f.done >= want {
		return f.err
	}
	f.running = true
	f.begun++
	f.mu.Unlock()
	err := pass()
	f.mu.Lock()
	f.running, f.done, f.err = false, f.begun, err
	f.cond.Broadcast()
	return err
}

// Flush makes everything that was written before it durable. It costs two fdatasync when sectors were allocated since the last one, one
// when only allocated sectors were overwritten, none when nothing was written. After a failed write or sync it reports ErrFailed, always.
func (d *Disk) Flush() error {
	g, ok := d.gate.enter(0)
	if !ok {
		return d.errClosed()
	}
	defer g.Add(-1)
	if d.readOnly {
		return nil
	}
	return d.flush.run(d.flushPass)
}

// flushPass is the crash rule: data, then bitmap.
func (d *Disk) flushPass() error {
	if f := d.failed.Load(); f != nil && f.sync {
		return d.failure()
	}
	top := d.chain.layers[0]
	// The order matters: a bit that stage sees was set after its data was written, so the sync below covers it; a write that is finished
	// has set written, so either we see it or the next flush does.
	staged := top.bm != nil && top.bm.stage()
	if wrote := d.written.Swap(false); !staged && !wrote {
		return d.failure()
	}
	err := d.sync(top)
	if staged {
		if err == nil {
			err = top.bm.write()
		}
		if err == nil {
			err = d.sync(top)
		}
		top.bm.unstage(err == nil)
	}
	if err != nil {
		d.fail(err, true)
	}
	return d.failure()
}

func (d *Disk) sync(l *layer) error {
	d.syncs.Add(1)
	return l.file.Sync()
}

// wrote is called after every successful or failed write to the file.
func (d *Disk) wrote() {
	if !d.written.Load() {
		d.written.Store(true)
	}
}
