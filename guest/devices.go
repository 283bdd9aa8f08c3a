package guest

import (
	"fmt"
	"log/slog"

	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/guest/imagefs"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtioblk"
	"github.com/moovm/moovm/virtionet"
)

// devices are the virtio devices of a guest's machine: disks first, in their
// order, so that the first is vda.
type devices struct {
	log    *slog.Logger
	disks  []*virtioblk.Device
	queues []int // of each disk
	all    []virtio.Device
}

// addDisk adds a disk whose contents are those of its Backend.
func (v *devices) addDisk(d Disk, queues int) error {
	i := len(v.disks)
	dev, err := virtioblk.New(virtioblk.Config{
		Backend: d.Backend, ReadOnly: d.ReadOnly, Serial: d.Serial, Queues: queues, Logger: v.log.With("disk", i),
	})
	if err != nil {
		return fmt.Errorf("disk %s: %w", diskName(i), err)
	}
	v.disks, v.queues, v.all = append(v.disks, dev), append(v.queues, queues), append(v.all, dev)
	return nil
}

// addShare adds a tree that is mounted by its tag.
func (v *devices) addShare(tag string, a p9.Attacher) error {
	dev, err := virtio9p.New(virtio9p.Config{Tag: tag, Attacher: a, Logger: v.log.With("share", tag)})
	if err != nil {
		return fmt.Errorf("share %q: %w", tag, err)
	}
	v.all = append(v.all, dev)
	return nil
}

// addNetwork adds interface i with its queues.
func (v *devices) addNetwork(i int, n Network, pairs int) error {
	dev, err := virtionet.New(virtionet.Config{Link: n.Link, MAC: n.MAC, MTU: n.MTU, Pairs: min(pairs, 8)})
	if err != nil {
		return fmt.Errorf("network %d: %w", i, err)
	}
	v.all = append(v.all, dev)
	return nil
}

// counters are disk i's, as the metadata tree shows them.
func (v *devices) counters(i int) []imagefs.Counter {
	s := v.disks[i].Stats()
	return []imagefs.Counter{
		{Name: "reads", Value: s.Reads}, {Name: "writes", Value: s.Writes}, {Name: "flushes", Value: s.Flushes},
		{Name: "discards", Value: s.Discards}, {Name: "write_zeroes", Value: s.WriteZeroes},
		{Name: "read_bytes", Value: s.ReadBytes}, {Name: "write_bytes", Value: s.WriteBytes},
		{Name: "discard_bytes", Value: s.DiscardBytes}, {Name: "write_zeroes_bytes", Value: s.WriteZeroesBytes},
		{Name: "errors", Value: s.Errors}, {Name: "in_flight", Value: s.InFlight},
	}
}
