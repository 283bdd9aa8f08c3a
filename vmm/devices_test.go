package vmm

import (
	"testing"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtioblk"
)

// newDisk is a block device of so many queues.
func newDisk(t testing.TB, b virtioblk.Backend, queues int) virtio.Device {
	t.Helper()
	dev, err := virtioblk.New(virtioblk.Config{Backend: b, Queues: queues})
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// newShare is a 9P device without a tree.
func newShare(t testing.TB) virtio.Device {
	t.Helper()
	dev, err := virtio9p.New(virtio9p.Config{Tag: "x", Attacher: noTree{}})
	if err != nil {
		t.Fatal(err)
	}
	return dev
}

// diskStats are the counters of the machine's first device, a disk.
func diskStats(m *Machine) virtioblk.Stats { return m.Stats().Devices[0].(virtioblk.Stats) }
