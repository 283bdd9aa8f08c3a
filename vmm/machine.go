package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/moovm/moovm/internal/kvm"
	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/pci"
)

// Machine is a virtual machine. Its methods may be called from any goroutine.
//
//	          Start           Pause
//	created ────────▶ running ──────▶ paused
//	   │                 │  ◀──────────  │
//	   │                 │    Resume     │
//	   │                 ▼               │
//	   │  guest, Stop: stopped ◀─────────┘ Stop
//	   ▼                 │ Close
//	closed ◀─────────────┘
type Machine struct {
	cfg Config
	log *slog.Logger

	sys     *kvm.System
	vm      *kvm.VM
	ram     *ram
	vcpus   []*vcpu
	irq     *interrupts
	bus     *pciBus
	com     [2]*uart
	rtc     *cmos
	devices []device
	windows []*mmio.Device // those of them that have one, by address
	// The machine as a PCI function and as a virtio-mmio device sees it.
	host   func(slot int) pci.Host
	window func(i int) (windowHost, error)

	mu      sync.Mutex
	changed sync.Cond // state or parked changed
	state   state
	parked  int    // vCPU threads that wait in park
	clock   uint64 // kvmclock while paused, in ns

	generation Generation
	reborn     int

	restored bool          // made from a snapshot: devices wait for Start
	features *featureState // what the host can tell of the processors' state, once asked
	reason   ExitReason
	err      error

	running sync.WaitGroup // vCPU threads
	done    chan struct{}  // closed when all of the machine has stopped
	hung    bool           // a device did not end; settled when done is closed

	closeOnce sync.Once
	closeErr  error
}

type state int

const (
	created state = iota
	running
	paused
	stopped // vCPUs leave as soon as they see it
)

func (s state) String() string { return [...]string{"created", "running", "paused", "stopped"}[s] }

// ErrClosed is returned by methods of a machine that has stopped or was closed.
var ErrClosed = errors.New("the machine has stopped")

// outputLimit is how long the end of a machine waits for its serial output to
// be taken.
const outputLimit = 2 * time.Second

// New builds a machine: opens KVM, makes guest memory, loads the kernel and
// sets up the devices. The guest does not run before Start or Run.
//
// The error wraps ErrKernel for an image that cannot be booted, and
// fs.ErrNotExist or fs.ErrPermission for a KVM device that cannot be opened.
func New(cfg Config) (_ *Machine, err error) {
	m := machineOf(cfg)
	cfg = m.cfg
	if cfg.CPUs < 1 || cfg.CPUs > MaxCPUs {
		return nil, fmt.Errorf("%d CPUs: a machine has 1 to %d", cfg.CPUs, MaxCPUs)
	}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	if m.ram, err = newRAM(cfg.Memory, cfg.HugePages); err != nil {
		return nil, err
	}
	boot, err := loadBoot(&m.cfg, m.ram.low())
	if err != nil {
		return nil, err
	}
	tables := acpiTables(addrACPI, cfg.CPUs, cfg.windows())
	if len(tables) > sizeACPI {
		return nil, fmt.Errorf("ACPI tables of %d bytes exceed %d", len(tables), sizeACPI)
	}
	copy(m.ram.low()[addrACPI:], tables)
	m.newGeneration()
	// The machine does not keep what it has copied.
	m.cfg.Kernel, m.cfg.Initrd = Kernel{}, nil

	if err = m.createVM(); err != nil {
		return nil, err
	}
	if err = m.createDevices(); err != nil {
		return nil, err
	}
	if err = m.createVCPUs(); err != nil {
		return nil, err
	}
	if err = m.setUpVCPUs(boot); err != nil {
		return nil, err
	}
	return m, nil
}

// machineOf fills in what cfg leaves out. Nothing is opened yet.
func machineOf(cfg Config) *Machine {
	if cfg.Memory == 0 {
		cfg.Memory = 256 << 20
	}
	if cfg.CPUs == 0 {
		cfg.CPUs = 1
	}
	if cfg.KVM == "" {
		cfg.KVM = DefaultKVM
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	m := &Machine{cfg: cfg, log: cfg.Logger, done: make(chan struct{}), bus: newPCIBus(), rtc: newCMOS(time.Now)}
	m.changed.L = &m.mu
	return m
}

func (m *Machine) createVM() (err error) {
	if m.sys, err = kvm.Open(m.cfg.KVM); err != nil {
		return err
	}
	if n := m.sys.CheckExtension(kvm.CapMaxVCPUs); m.cfg.CPUs > n {
		return fmt.Errorf("%d CPUs: this KVM has at most %d", m.cfg.CPUs, n)
	}
	if m.vm, err = m.sys.CreateVM(); err != nil {
		return err
	}
	if err = m.vm.SetTSSAddr(addrTSS); err != nil {
		return err
	}
	if err = m.vm.SetIdentityMapAddr(addrIdentity); err != nil {
		return err
	}
	if err = m.vm.CreateIRQChip(); err != nil {
		return err
	}
	if err = m.vm.CreatePIT(); err != nil {
		return err
	}
	for slot, r := range m.ram.regions {
		if err = m.vm.SetMemory(slot, r.Addr, r.Bytes); err != nil {
			return err
		}
	}
	m.irq = newInterrupts(m.vm)
	if err = m.irq.install(); err != nil {
		return err
	}
	m.host = func(slot int) pci.Host { return &slotHost{m: m, slot: slot} }
	m.window = func(i int) (windowHost, error) { return newIRQFDHost(m, i) }
	for i, gsi := range []uint32{irqCOM1, irqCOM2} {
		m.com[i] = newUART(func(level bool) { m.vm.IRQLine(gsi, level) })
	}
	return nil
}

func (m *Machine) createVCPUs() error {
	for i := range m.cfg.CPUs {
		v, err := m.vm.CreateVCPU(i)
		if err != nil {
			return err
		}
		m.vcpus = append(m.vcpus, &vcpu{m: m, id: i, v: v})
	}
	return nil
}

// setUpVCPUs makes the processors what they are at power-on, and the first one
// what the boot protocol asks for.
func (m *Machine) setUpVCPUs(boot bootImage) error {
	supported, err := m.sys.SupportedCPUID()
	if err != nil {
		return err
	}
	deadline := m.sys.CheckExtension(kvm.CapTSCDeadline) != 0
	for i, c := range m.vcpus {
		khz, err := c.v.TSCKHz()
		if err != nil {
			khz = 0 // unknown: the guest measures
		}
		if err := c.setCPUID(cpuidFor(slices.Clone(supported), i, m.cfg.CPUs, khz, deadline)); err != nil {
			return err
		}
	}
	// The others wait for their INIT and SIPI.
	v := m.vcpus[0].v
	s, err := v.Sregs()
	if err != nil {
		return err
	}
	regs := boot.registers(s)
	if err := v.SetSregs(s); err != nil {
		return err
	}
	return v.SetRegs(regs)
}

// Start lets the guest run. It may be called once.
func (m *Machine) Start() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch m.state {
	case created:
	case stopped:
		return ErrClosed
	default:
		return errors.New("the machine was started already")
	}
	if m.restored {
		if err := m.vm.SetClock(m.clock); err != nil {
			return err
		}
		m.resumeDevices(true)
		if err := m.tellGeneration(); err != nil {
			return err
		}
	}
	m.state = running
	m.com[0].start(m.cfg.Console)
	m.com[1].start(m.cfg.Control)
	m.running.Add(len(m.vcpus))
	for _, c := range m.vcpus {
		go func() {
			defer m.running.Done()
			c.run()
		}()
	}
	go m.supervise()
	return nil
}

// supervise ends the devices once every vCPU thread has ended.
func (m *Machine) supervise() {
	defer close(m.done)
	m.running.Wait()
	err := m.closeDevices()
	m.hung = hangs(err)
	var wg sync.WaitGroup
	for i, u := range m.com {
		wg.Go(func() {
			if lost := u.close(outputLimit); lost > 0 {
				m.log.Warn("serial output lost: it was not taken in time", "port", i, "bytes", lost)
			}
		})
	}
	wg.Wait()
	if err != nil {
		m.log.Warn("ending devices", "error", err)
	}
}

// park is where vCPU threads wait while the machine is paused. It returns
// false when the machine has stopped.
func (m *Machine) park(c *vcpu) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == paused {
		m.parked++
		m.changed.Broadcast()
		for m.state == paused {
			m.changed.Wait()
		}
		m.parked--
		m.changed.Broadcast()
		if err := c.v.KVMClockPaused(); err != nil {
			m.log.Warn("resume", "cpu", c.id, "error", err)
		}
	}
	if m.state == stopped {
		return false
	}
	c.v.ImmediateExit(false)
	return true
}

// Pause stops all vCPUs between two instructions and the guest's clock, and
// returns when they stand still. Devices finish the requests they have begun.
// Pausing a paused machine does nothing.
func (m *Machine) Pause() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	// A resume that is still under way: let its threads leave first.
	for m.state == running && m.parked > 0 {
		m.changed.Wait()
	}
	begun := m.state == running
	switch m.state {
	case running:
		m.state = paused
		for _, c := range m.vcpus {
			c.kick()
		}
	case created:
		return errors.New("the machine was not started yet")
	}
	for m.state == paused && m.parked < len(m.vcpus) {
		m.changed.Wait()
	}
	if m.state != paused {
		return ErrClosed // or resumed meanwhile, by somebody else
	}
	if !begun {
		return nil
	}
	var err error
	m.clock, err = m.vm.Clock()
	return err
}

// Resume lets a paused machine go on. The guest's clock goes on from where it
// was. Resuming a running machine does nothing.
func (m *Machine) Resume() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch m.state {
	case running:
		return nil
	case paused:
	case created:
		return errors.New("the machine was not started yet")
	default:
		return ErrClosed
	}
	err := m.vm.SetClock(m.clock)
	m.state = running
	m.changed.Broadcast()
	return err
}

// PowerButton presses the power button: it asks the guest politely to switch
// itself off. Whether it does is the guest's decision.
func (m *Machine) PowerButton() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == created || m.state == stopped {
		return ErrClosed
	}
	return errors.Join(m.vm.IRQLine(irqPower, true), m.vm.IRQLine(irqPower, false))
}

// Reset presses the reset button: the machine stops with reason Reset, as if
// the guest had reset itself. To boot again, make a new machine.
func (m *Machine) Reset() { m.finish(Reset, nil) }

// finish stops the machine for a reason; the first one counts.
func (m *Machine) finish(r ExitReason, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == stopped {
		return
	}
	begun := m.state != created
	m.state, m.reason, m.err = stopped, r, err
	m.changed.Broadcast()
	for _, c := range m.vcpus {
		c.kick()
	}
	if !begun {
		close(m.done)
	}
}

// Run is Start and Wait: it runs the guest until it stops, and says why it
// did. The end of ctx stops it within milliseconds (reason Stopped, nil error).
func (m *Machine) Run(ctx context.Context) (ExitReason, error) {
	if err := m.Start(); err != nil {
		return Failed, err
	}
	defer context.AfterFunc(ctx, m.Stop)()
	return m.Wait()
}

// Wait waits until the machine has stopped: no vCPU runs, the devices have
// finished what they were doing and the serial output is written. The error
// belongs to the reason Failed; a *VCPUError has the registers.
func (m *Machine) Wait() (ExitReason, error) {
	<-m.done
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reason, m.err
}

// Stop stops the machine as if its power failed, with reason Stopped.
func (m *Machine) Stop() { m.finish(Stopped, nil) }

// Close stops the machine and releases everything it holds. It is idempotent.
// A device whose backend hangs is waited for during 5 seconds. Then the error
// wraps context.DeadlineExceeded, and the guest's memory stays mapped until the
// backend returns, which may write to it.
func (m *Machine) Close() error {
	m.closeOnce.Do(func() {
		m.Stop()
		<-m.done
		m.closeErr = m.release()
	})
	return m.closeErr
}

// release gives back descriptors and mappings; nothing runs any more.
func (m *Machine) release() error {
	var err error
	if !m.hung { // else it has had its time
		err = m.closeDevices()
	}
	if m.hung = m.hung || hangs(err); m.hung {
		err = fmt.Errorf("a device's backend hangs; the guest's memory stays mapped: %w", context.DeadlineExceeded)
	}
	for _, c := range m.vcpus {
		err = errors.Join(err, c.v.Close())
	}
	if m.vm != nil {
		err = errors.Join(err, m.vm.Close())
	}
	if m.sys != nil {
		err = errors.Join(err, m.sys.Close())
	}
	switch {
	case m.ram == nil:
	case m.hung:
		go func() {
			for hangs(m.closeDevices()) {
			}
			m.ram.Close()
		}()
	default:
		m.ram.Close()
	}
	return err
}
