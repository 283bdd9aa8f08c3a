package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/moovm/moovm/internal/kvm"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/pci"
)

// Errors of snapshots. They come wrapped in what does not fit.
var (
	// ErrSnapshotHost says that this host cannot run the machine.
	ErrSnapshotHost = errors.New("this host cannot continue the snapshot")
	// ErrSnapshotDamaged says that a snapshot makes no sense.
	ErrSnapshotDamaged = errors.New("the snapshot is damaged")
	// ErrSnapshotDevices says that a machine was given other devices than
	// those that the snapshot has.
	ErrSnapshotDevices = errors.New("the snapshot has other devices")
)

// snapshotVersion changes when an older moovm could not read a state.
const snapshotVersion = 1

// machineState is everything about a machine but its memory: plain data.
type machineState struct {
	Version   int
	Memory    int64
	Transport Transport
	VCPUs     []vcpuState
	PIT       kvm.PIT
	Chips     [3]kvm.IRQChip // ChipPICMaster, ChipPICSlave, ChipIOAPIC
	Clock     uint64         // kvmclock, ns
	Serial    [2]uartState   // Console, Control
	CMOS      cmosState
	PCI       uint32       // the address register
	Functions []pci.State  `json:",omitempty"` // by slot, TransportPCI
	Windows   []mmio.State `json:",omitempty"` // TransportMMIO
}

// Snapshot is a machine at one instant: its processors, memory and devices. It
// never changes. Any number of machines can be made from it, at once and from
// any goroutine; they share what they do not write.
//
// What devices stand for, the contents of a disk say, is not in it: that is
// frozen by whoever owns the devices while the machine stands still (see
// SnapshotOptions.Frozen).
type Snapshot struct {
	state machineState
	mem   *image
	saved bool // opened from files: it may be from another host

	closeOnce sync.Once
	closeErr  error
}

// Close gives the snapshot's memory back. Machines made from it go on. It is
// idempotent.
func (s *Snapshot) Close() error {
	s.closeOnce.Do(func() { s.closeErr = s.mem.release() })
	return s.closeErr
}

// Memory is the size of the machine's memory in bytes, CPUs the number of its
// processors.
func (s *Snapshot) Memory() int64 { return s.state.Memory }

// CPUs is the number of the machine's processors.
func (s *Snapshot) CPUs() int { return len(s.state.VCPUs) }

// SnapshotOptions are how a snapshot is taken.
type SnapshotOptions struct {
	// Frozen, if set, is called while the machine stands still and its
	// devices are idle: the place to freeze disks, so that they and the
	// memory are of one instant. Its error fails the snapshot.
	Frozen func() error
}

// Snapshot freezes the machine as it is now and lets it go on. It waits, until
// ctx ends, for the requests that devices have begun; after an error the
// machine goes on as if nothing had been asked. A machine that is paused stays
// paused.
//
// The machine shares its memory with the snapshot from then on and copies what
// it writes.
func (m *Machine) Snapshot(ctx context.Context, o SnapshotOptions) (s *Snapshot, err error) {
	resume, err := m.standStill(ctx)
	if err != nil {
		return nil, err
	}
	s = &Snapshot{}
	defer func(taken *Snapshot) {
		if err = errors.Join(err, resume(false)); err != nil && taken.mem != nil {
			s, err = nil, errors.Join(err, taken.Close()) // nobody else will
		}
	}(s)
	if s.state, err = m.captureState(); err != nil {
		return nil, err
	}
	if o.Frozen != nil {
		if err := o.Frozen(); err != nil {
			return nil, err
		}
	}
	if s.mem, err = m.ram.freeze(); err != nil {
		return nil, err
	}
	return s, nil
}

// StandStill pauses the machine, if it runs, and waits, until ctx ends, for what
// its devices have begun: nothing that is outside of the machine, such as its
// disks, changes any more. The function it returns lets the machine go on if it
// ran before; it must be called.
func (m *Machine) StandStill(ctx context.Context) (resume func() error, err error) {
	goOn, err := m.standStill(ctx)
	if err != nil {
		return nil, err
	}
	return func() error { return goOn(false) }, nil
}

// standStill pauses the machine, if it runs, and its devices. The function it
// returns lets both go on; again says that they have been given a state.
func (m *Machine) standStill(ctx context.Context) (resume func(again bool) error, err error) {
	m.mu.Lock()
	was := m.state
	m.mu.Unlock()
	if was != created {
		if err := m.Pause(); err != nil {
			return nil, err
		}
	}
	goOn := func(again bool) error {
		m.resumeDevices(again)
		if was != running {
			return nil
		}
		return m.Resume()
	}
	if err := m.suspendDevices(ctx); err != nil {
		return nil, errors.Join(err, goOn(false))
	}
	return goOn, nil
}

// askFeatures asks once what there is of the processors' state.
func (m *Machine) askFeatures() error {
	if m.features != nil {
		return nil
	}
	f, err := stateFeatures(m.sys, m.vcpus[0].v)
	if err == nil {
		m.features = &f
	}
	return err
}

// captureState reads the state of a machine that stands still.
func (m *Machine) captureState() (s machineState, err error) {
	s = machineState{Version: snapshotVersion, Memory: m.ram.size, Transport: m.cfg.Transport, Clock: m.clock}
	if err := m.askFeatures(); err != nil {
		return s, err
	}
	for _, c := range m.vcpus {
		v, err := c.state(*m.features)
		if err != nil {
			return s, err
		}
		s.VCPUs = append(s.VCPUs, v)
	}
	pit, err := m.vm.PIT()
	if err != nil {
		return s, err
	}
	s.PIT = *pit
	for i := range s.Chips {
		c, err := m.vm.IRQChip(uint32(i))
		if err != nil {
			return s, err
		}
		s.Chips[i] = *c
	}
	for i, u := range m.com {
		s.Serial[i] = u.state()
	}
	s.CMOS = m.rtc.state()
	s.PCI = m.bus.state()
	if err := m.saveDevices(&s); err != nil {
		return s, err
	}
	return s, nil
}

// ForkConfig is what a machine made from a snapshot gets of its own. Its shape
// is the snapshot's.
type ForkConfig struct {
	// Devices are as many, and of the same kinds, as the snapshot's machine
	// had, in the same order.
	Devices []virtio.Device
	// Console and Control are the serial ports. What the snapshot's machine
	// had written there before stays its own.
	Console, Control Serial
	// KVM is the path of the KVM device; empty means /dev/kvm.
	KVM string
	// Logger takes the machine's own messages; nil discards them.
	Logger *slog.Logger
}

// Fork makes a machine that goes on where the snapshot was taken, once it is
// started. The snapshot may be closed before the machine is.
//
// The error wraps ErrSnapshotHost, ErrSnapshotDevices or ErrSnapshotDamaged for
// a snapshot that does not fit.
func (s *Snapshot) Fork(cfg ForkConfig) (*Machine, error) {
	m, err := s.shell(cfg.KVM)
	if err != nil {
		return nil, err
	}
	if err := s.enter(m, cfg); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// shell makes everything of a machine that does not depend on what it becomes:
// what a fork would wait for, and can be made ahead.
func (s *Snapshot) shell(kvmPath string) (_ *Machine, err error) {
	m := machineOf(Config{Memory: s.state.Memory, CPUs: len(s.state.VCPUs), Transport: s.state.Transport, KVM: kvmPath})
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	if m.ram, err = reserveRAM(s.state.Memory); err != nil {
		return nil, err
	}
	if err = m.createVM(); err != nil {
		return nil, err
	}
	if s.saved {
		if err = s.fitsHost(m.sys); err != nil {
			return nil, err
		}
	}
	if err = m.createVCPUs(); err != nil {
		return nil, err
	}
	for i, c := range m.vcpus {
		if err = c.setCPUID(s.state.VCPUs[i].CPUID); err != nil {
			return nil, err
		}
	}
	return m, m.askFeatures()
}

// enter makes a shell the machine of the snapshot.
func (s *Snapshot) enter(m *Machine, cfg ForkConfig) error {
	m.cfg.Devices, m.cfg.Console, m.cfg.Control = cfg.Devices, cfg.Console, cfg.Control
	if cfg.Logger != nil {
		m.cfg.Logger, m.log = cfg.Logger, cfg.Logger
	}
	if err := m.createDevices(); err != nil {
		return err
	}
	if err := m.ram.show(s.mem); err != nil {
		return err
	}
	if err := m.applyState(&s.state); err != nil {
		return err
	}
	m.newGeneration()
	m.restored = true
	return nil
}

// fitsHost says whether the snapshot's processors can run here.
func (s *Snapshot) fitsHost(sys *kvm.System) error {
	supported, err := sys.SupportedCPUID()
	if err != nil {
		return err
	}
	for _, v := range s.state.VCPUs {
		if err := fits(v.CPUID, supported); err != nil {
			return err
		}
	}
	return nil
}

// Rewind puts the machine back to a snapshot: its own, or one of a machine of
// the same shape. It waits, until ctx ends, for the requests that devices have
// begun; their devices stay, with what they stand for put back by
// SnapshotOptions.Frozen. A machine that runs goes on at once.
func (m *Machine) Rewind(ctx context.Context, s *Snapshot, o SnapshotOptions) (err error) {
	if s.state.Memory != m.ram.size || len(s.state.VCPUs) != len(m.vcpus) || s.state.Transport != m.cfg.Transport {
		return fmt.Errorf("%w: it is of a machine with %d bytes of memory and %d CPUs, this one has %d and %d",
			ErrSnapshotDevices, s.state.Memory, len(s.state.VCPUs), m.ram.size, len(m.vcpus))
	}
	resume, err := m.standStill(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, resume(true)) }()
	if o.Frozen != nil {
		if err := o.Frozen(); err != nil {
			return err
		}
	}
	if err := m.ram.rewind(s.mem); err != nil {
		return err
	}
	if err := m.applyState(&s.state); err != nil {
		return err
	}
	m.newGeneration()
	return m.tellGeneration()
}

// applyState puts a state into a machine of the same shape that stands still.
func (m *Machine) applyState(s *machineState) error {
	if err := m.askFeatures(); err != nil {
		return err
	}
	offsets, err := m.tscOffsets(s)
	if err != nil {
		return err
	}
	for i, c := range m.vcpus {
		if err := c.setState(&s.VCPUs[i], *m.features, offsets[i]); err != nil {
			return err
		}
	}
	if err := m.vm.SetPIT(&s.PIT); err != nil {
		return err
	}
	for i := range s.Chips {
		if err := m.vm.SetIRQChip(&s.Chips[i]); err != nil {
			return err
		}
	}
	m.mu.Lock()
	m.clock = s.Clock
	m.mu.Unlock()
	for i, u := range m.com {
		u.setState(s.Serial[i])
	}
	m.rtc.setState(s.CMOS)
	m.bus.setState(s.PCI)
	return m.irq.together(func() error { return m.restoreDevices(s) })
}

// tscOffsets are the offsets with which the time stamp counters go on from
// where they were: equal if they were equal. nil where this host or that of
// the snapshot has none.
func (m *Machine) tscOffsets(s *machineState) ([]*uint64, error) {
	out := make([]*uint64, len(m.vcpus))
	have, err := m.vcpus[0].v.TSCOffset()
	if errors.Is(err, kvm.ErrNoAttr) || s.VCPUs[0].TSCOffset == nil {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	now, err := m.vcpus[0].tsc()
	if err != nil {
		return nil, err
	}
	first := have + s.VCPUs[0].TSC - now // modulo 2^64, as KVM counts
	for i, v := range s.VCPUs {
		if v.TSCOffset != nil {
			off := first + *v.TSCOffset - *s.VCPUs[0].TSCOffset
			out[i] = &off
		}
	}
	return out, nil
}
