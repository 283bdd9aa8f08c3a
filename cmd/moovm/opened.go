package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/dustin/go-humanize"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/internal/closing"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/kernel"
	"github.com/moovm/moovm/kmod"
)

// opened is what a request names, open and locked.
type opened struct {
	kernel  *kernel.Kernel
	modules *kmod.Modules // nil: the kernel has all it needs built in
	initrd  []byte
	disks   []guest.Disk
	shares  []guest.Share

	closers []closing.Item
}

func (o *opened) hold(name string, c io.Closer) {
	o.closers = append(o.closers, closing.Item{Name: name, Closer: c})
}

// inOrder is closed one after the other: an overlay before what it stands on.
type inOrder []io.Closer

func (l inOrder) Close() (err error) {
	for _, c := range l {
		err = errors.Join(err, c.Close())
	}
	return err
}

// Close closes it all, and does not wait for what hangs for long once ctx has
// ended. It may be called again.
func (o *opened) Close(ctx context.Context, log *slog.Logger) {
	warnLate(log, closing.Within(ctx, closing.Limit, o.closers...))
	o.closers = nil
}

// warnLate says what could not be closed in time.
func warnLate(log *slog.Logger, err error) {
	var late *closing.LateError
	if errors.As(err, &late) {
		log.Warn(late.Error())
	}
}

// open opens all that the request names, or nothing.
func (r *machineRequest) open(ctx context.Context) (_ *opened, err error) {
	o := &opened{}
	defer func() {
		if err != nil {
			o.Close(ctx, r.images.log)
		}
	}()
	if err := r.openKernel(o); err != nil {
		return nil, err
	}
	if err := r.openDisks(o); err != nil {
		return nil, err
	}
	return o, r.openShares(o)
}

func (r *machineRequest) openKernel(o *opened) (err error) {
	if r.kernel == "" {
		if r.kernel, err = host.Kernel(); err != nil {
			return err
		}
	}
	if o.kernel, err = kernel.LoadKernel(r.kernel); err != nil {
		return err
	}
	o.hold("the kernel", o.kernel)
	switch {
	case r.initrd != "":
		o.initrd, err = r.readInitrd()
	case r.modules != "":
		o.modules, err = kmod.OpenModules(r.modules, o.kernel.Release)
	default:
		if o.modules, err = kmod.FindModules(o.kernel); errors.Is(err, kmod.ErrNoModules) {
			err = nil
		}
	}
	return err
}

// readInitrd reads the initrd if the guest's memory can hold it.
func (r *machineRequest) readInitrd() ([]byte, error) {
	st, err := os.Stat(r.initrd)
	if err != nil {
		return nil, fmt.Errorf("initrd: %w", err)
	}
	if st.Size() > r.memory {
		return nil, fmt.Errorf("initrd %s: its %s do not fit into the guest's memory of %s; raise --memory", r.initrd,
			humanize.IBytes(uint64(st.Size())), humanize.IBytes(uint64(r.memory)))
	}
	b, err := os.ReadFile(r.initrd)
	if err != nil {
		return nil, fmt.Errorf("initrd: %w", err)
	}
	return b, nil
}

// openDisks opens the base's overlay, then the disks.
func (r *machineRequest) openDisks(o *opened) error {
	if r.base != "" {
		d, err := openEphemeral(r.base, r.images.options())
		if err != nil {
			return err
		}
		o.hold("disk "+r.base, d)
		o.disks = append(o.disks, guest.Disk{COW: d})
	}
	for _, f := range r.disks {
		d, err := f.open(r.images.options())
		if err != nil {
			return err
		}
		o.hold("disk "+f.path, d)
		o.disks = append(o.disks, guest.Disk{COW: d, ReadOnly: f.readOnly, Serial: f.serial})
	}
	return nil
}

func (r *machineRequest) openShares(o *opened) error {
	for _, f := range r.shares {
		s, err := sharefs.New(f.dir, sharefs.Options{Writable: f.writable, MaxFiles: sharefs.FilesEach(len(r.shares))})
		if err != nil {
			return fmt.Errorf("--share %s: %w", f.text, err)
		}
		o.hold("share "+f.dir, s)
		o.shares = append(o.shares, guest.Share{Tag: f.tag, Attacher: s, Target: f.target(), ReadOnly: !f.writable})
	}
	return nil
}
