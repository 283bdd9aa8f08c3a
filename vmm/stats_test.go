package vmm

import (
	"errors"
	"maps"
	"testing"
	"time"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio9p"
	"github.com/moovm/moovm/virtioblk"
	"github.com/moovm/moovm/virtiorng"
)

func TestStats(t *testing.T) {
	m, out := newMachine(t, asm{}.print("counted").spin(), func(c *Config) {
		c.CPUs, c.Devices = 2, []virtio.Device{newDisk(t, zeroDisk(1<<20), 1), virtiorng.Device{}}
	})
	before := m.Stats()
	if before.State != "created" || before.RAM != 4<<20 || before.RAMUsed == 0 || before.RAMUsed >= before.RAM || len(before.Devices) != 2 || before.Devices[0] != (virtioblk.Stats{}) || before.Devices[1] != nil {
		t.Errorf("before the start: %+v", before)
	}
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "counted")
	running := m.Stats()
	eventually(t, "processor time", func() bool { return m.Stats().VCPUs[0].Time > running.VCPUs[0].Time })
	if running.State != "running" || running.Serial[0].Out != uint64(len("counted")) || running.Serial[1] != (SerialStats{}) {
		t.Errorf("running: %+v", running)
	}
	if n := running.VCPUs[0].Exits["io"]; n != uint64(len("counted")) || len(running.VCPUs) != 2 {
		t.Errorf("%d exits by ports; one for each byte was expected: %+v", n, running.VCPUs)
	}
	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	if s := m.Stats().State; s != "paused" {
		t.Error(s)
	}
	m.Stop()
	m.Wait()
	end := m.Stats()
	if end.State != "stopped" || end.VCPUs[0].Time < running.VCPUs[0].Time || end.VCPUs[0].Time != m.Stats().VCPUs[0].Time {
		t.Errorf("after the end: %+v, before %+v", end, running)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if closed := m.Stats(); closed.RAMUsed != 0 || closed.VCPUs[0].Exits["io"] == 0 {
		t.Errorf("closed: %+v", closed)
	}
}

func TestShareStats(t *testing.T) {
	m, _ := newMachine(t, asm{}.spin(), func(c *Config) { c.Devices = []virtio.Device{newShare(t)} })
	if s := m.Stats().Devices; len(s) != 1 || s[0] != (virtio9p.Stats{Tag: "x"}) {
		t.Errorf("%+v", s)
	}
}

// noTree is a share that cannot be mounted.
type noTree struct{}

func (noTree) Attach() (p9.File, error) { return nil, errors.New("there is nothing") }

// An idle guest costs nothing: no exits, no timers, no loops. What is left of
// a second is a measure of the rest of this process.
func TestIdle(t *testing.T) {
	m, out := newMachine(t, asm{}.print("!").hang(), func(c *Config) {
		c.CPUs, c.Devices = 2, []virtio.Device{newDisk(t, zeroDisk(1<<20), 1), newShare(t)}
	})
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	cpu := func() time.Duration {
		var r unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
			t.Fatal(err)
		}
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	time.Sleep(100 * time.Millisecond)
	used, exits := cpu(), m.Exits()
	time.Sleep(time.Second)
	used = cpu() - used
	t.Logf("%v of processor time in a second", used)
	if after := m.Exits(); !maps.Equal(exits, after) {
		t.Errorf("exits of a guest that does nothing: %v, later %v", exits, after)
	}
	if used > time.Second/2 {
		t.Errorf("%v of processor time in a second: something loops", used)
	}
}
