package guest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/moovm/moovm/cowdisk"
)

// ErrNoDisk says that a guest has no disk of the name, or none that it can be
// done to.
var ErrNoDisk = errors.New("no such disk")

// DiskName is what the guest calls disk i of Config.Disks: vda, vdb…
func DiskName(i int) string { return diskName(i) }

// SnapshotDisks freezes the contents of disks, by their name in the guest, all
// at one instant: each goes on in a new overlay at the path it is given
// (cowdisk.Disk.Snapshot). The guest stands still meanwhile, and what it has
// flushed before is in the frozen layers; what it has only written may be. Done
// are the disks that go on in their overlays; after an error the others go on
// as they were.
//
// With fewer than all disks, or without a file system frozen by the guest, a
// frozen layer is what a power cut leaves: a journal has to be replayed.
func (g *Guest) SnapshotDisks(ctx context.Context, overlays map[string]string) (done []string, err error) {
	disks := map[string]*cowdisk.Disk{}
	for name := range overlays {
		if disks[name], err = g.snapshotDisk(name); err != nil {
			return nil, err
		}
	}
	g.snapshots.Lock()
	defer g.snapshots.Unlock()
	resume, err := g.machine.StandStill(ctx)
	if err != nil {
		return nil, err
	}
	for _, name := range slices.Sorted(maps.Keys(overlays)) {
		if err = disks[name].Snapshot(overlays[name]); err != nil {
			err = fmt.Errorf("disk %s: %w", name, err)
			break
		}
		done = append(done, name)
	}
	return done, errors.Join(err, resume())
}

// snapshotDisk is a disk that can be frozen.
func (g *Guest) snapshotDisk(name string) (*cowdisk.Disk, error) {
	for i, d := range g.cfg.Disks {
		switch {
		case diskName(i) != name:
		case d.COW == nil:
			return nil, fmt.Errorf("disk %s: %w: it is no image of ours", name, ErrNoDisk)
		default:
			return d.COW, nil
		}
	}
	return nil, fmt.Errorf("disk %s: %w: the guest has %d, from vda on", name, ErrNoDisk, len(g.cfg.Disks))
}
