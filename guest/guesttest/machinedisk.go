package guesttest

import (
	"context"
	"math"
	"path/filepath"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/host"
)

// MachineDisk is a disk of a Machine: an overlay on its image, or an empty
// disk. It can be looked at while the guest runs.
type MachineDisk struct {
	m *Machine
	d *bootDisk
}

// Path is the overlay's file; it goes with the test.
func (d *MachineDisk) Path() string { return d.d.path }

// tool writes what the host still holds of the disk, so that others who open
// the file see it. What the guest has not written yet is not there.
func (d *MachineDisk) tool() (cowdisk.ToolOptions, error) {
	o := cowdisk.Options{ReadOnly: true, NoLock: true, Format: cowdisk.FormatCOW, BackingRoots: host.BackingRoots()}
	if d.d.image != "" {
		o.BackingRoots = append(o.BackingRoots, filepath.Dir(d.d.image))
	}
	return cowdisk.ToolOptions{Options: o}, d.d.cow.Flush()
}

// Flatten writes the whole disk as it is now to a raw image.
func (d *MachineDisk) Flatten(ctx context.Context, out string) error {
	o, err := d.tool()
	if err != nil {
		return err
	}
	return cowdisk.Flatten(ctx, d.d.path, out, cowdisk.VariantUnknown, o)
}

// Compare compares the disk with another image, COW or raw; a name that ends in
// ,format=raw or ,format=cow says which.
func (d *MachineDisk) Compare(ctx context.Context, other string) (cowdisk.Comparison, error) {
	o, err := d.tool()
	if err != nil {
		return cowdisk.Comparison{}, err
	}
	if other, o.OtherFormat, err = cowdisk.SplitFormat(other); err != nil {
		return cowdisk.Comparison{}, err
	}
	return cowdisk.Compare(ctx, d.d.path, other, o)
}

// Map says where each range of the disk comes from.
func (d *MachineDisk) Map(ctx context.Context) (extents []cowdisk.Extent, err error) {
	err = d.d.cow.Extents(ctx, 0, min(d.d.cow.Size(), math.MaxInt64), func(e cowdisk.Extent) error {
		extents = append(extents, e)
		return nil
	})
	return extents, err
}

// Allocated is how many bytes of the disk are in the overlay.
func (d *MachineDisk) Allocated() int64 { return d.d.cow.Allocated() * sector }
