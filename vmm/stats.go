package vmm

import (
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/kvm"
	"github.com/moovm/moovm/virtio"
)

// Stats is a snapshot of a machine's counters. They start at zero with the
// machine and only grow, but for RAMUsed and requests in flight.
type Stats struct {
	// State is created, running, paused or stopped.
	State string
	VCPUs []VCPUStats
	// RAM is the guest's memory in bytes, RAMUsed how much of it exists: what
	// the guest has touched. RAMUsed is 0 once the machine is closed.
	RAM, RAMUsed int64
	// Devices are the counters of each of Config.Devices, of a type of the
	// device's own (virtio.StatsReporter); nil for one that counts nothing.
	Devices []any
	Serial  [2]SerialStats // Console, Control
}

// VCPUStats are one virtual processor's.
type VCPUStats struct {
	// Exits counts the exits to user space by kind, as KVM names it.
	Exits map[string]uint64
	// Time is the processor time of the vCPU's thread: in the guest, in KVM and
	// in this program.
	Time time.Duration
}

// SerialStats are one serial port's, in bytes.
type SerialStats struct {
	In, Out uint64 // to the guest, from the guest
	Lost    uint64 // from the guest, dropped because nobody took it
}

// Stats returns the machine's counters now. It may be called at any time, as
// often as one likes; the guest is not held up.
func (m *Machine) Stats() Stats {
	s := Stats{RAM: m.cfg.Memory, RAMUsed: m.ram.used()}
	m.mu.Lock()
	s.State = m.state.String()
	m.mu.Unlock()
	for _, c := range m.vcpus {
		v := VCPUStats{Exits: map[string]uint64{}, Time: c.time.now()}
		c.countExits(v.Exits)
		s.VCPUs = append(s.VCPUs, v)
	}
	for _, d := range m.cfg.Devices {
		var counters any
		if r, ok := d.(virtio.StatsReporter); ok {
			counters = r.ReportStats()
		}
		s.Devices = append(s.Devices, counters)
	}
	for i, u := range m.com {
		s.Serial[i] = u.stats()
	}
	return s
}

// Exits counts the vCPUs' exits to user space since Start, by kind.
func (m *Machine) Exits() map[string]uint64 {
	n := map[string]uint64{}
	for _, c := range m.vcpus {
		c.countExits(n)
	}
	return n
}

func (c *vcpu) countExits(n map[string]uint64) {
	for kind := range c.exits {
		if v := c.exits[kind].Load(); v != 0 {
			n[kvm.Exit(kind).String()] += v
		}
	}
}

// threadTime measures the processor time a thread spends between begin and
// end, both called on it; now may be called from any.
type threadTime struct {
	mu    sync.Mutex
	tid   int // 0 = not running
	begun time.Duration
	total time.Duration // of what has ended
}

func (t *threadTime) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.tid = threadID()
	t.begun = threadClock(t.tid)
}

func (t *threadTime) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.total += threadClock(t.tid) - t.begun
	t.tid = 0
}

func (t *threadTime) now() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.tid == 0 {
		return t.total
	}
	return t.total + threadClock(t.tid) - t.begun
}

// threadClock reads the processor clock of a thread of this process, as
// pthread_getcpuclockid(3) names it.
func threadClock(tid int) time.Duration {
	const perThread, scheduled = 4, 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^tid<<3|perThread|scheduled), &ts); err != nil {
		return 0 // cannot happen: the thread is this one or waits for t.mu to end
	}
	return time.Duration(ts.Nano())
}
