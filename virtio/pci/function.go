package pci

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moovm/moovm/internal/ratelog"
	"github.com/moovm/moovm/virtio"
)

// Options are the choices a machine has for a Function; the zero value is
// good for most.
type Options struct {
	// Class is the 24-bit PCI class code (base class, subclass, interface);
	// 0 means the customary one for the device type.
	Class uint32
	// SubsystemID is the PCI subsystem ID; 0 means 0x40 + device type.
	SubsystemID uint16
	// InterruptPin is the INTx pin, 1 (INTA) to 4; 0 means 1.
	InterruptPin uint8
	// AccessPlatform offers VIRTIO_F_ACCESS_PLATFORM (an IOMMU stands
	// between device and memory).
	AccessPlatform bool
	// CloseWait bounds how long Reset and Close wait for requests in
	// flight; 0 means 5 seconds.
	CloseWait time.Duration
	// Logger receives what is worth knowing about a misbehaving driver;
	// nil discards it.
	Logger *slog.Logger
}

// BAR describes a base address register, so that the machine can place it.
type BAR struct {
	Index int    // 0 to 5; a 64-bit BAR takes the next one too
	Size  uint64 // bytes, a power of two
	Is64  bool
}

// Layout of the one BAR. Doorbells and the MSI-X table have pages of their
// own, so that a machine may map or protect them separately.
const (
	commonOff    = 0x0000
	isrOff       = 0x1000
	deviceOff    = 0x2000
	deviceLen    = 0x1000
	msixTableOff = 0x3000 // 16 bytes per vector, up to 2 pages
	msixPBAOff   = 0x5000
	notifyOff    = 0x6000 // 4 bytes per queue

	notifyMultiplier = 4
	maxQueues        = 256
)

// Function is one PCI function with a virtio device behind it. Its methods
// are safe for concurrent use by several vCPUs.
type Function struct {
	core    *virtio.Core
	host    Host
	opts    Options
	log     *slog.Logger
	id      uint32
	barSize uint64

	// Each part has its own lock; none is held while the core is called,
	// which calls back for interrupts and resets.
	cfg    configSpace
	bar    barState
	msix   msix
	isr    isr
	common commonConfig
	master sync.Mutex // follows the bus master bit, which two vCPUs may write
}

// New plugs dev into a new function. The function owns the device's queues
// and interrupts from now on; Close releases them.
func New(dev virtio.Device, mem *virtio.Memory, host Host, o Options) (*Function, error) {
	if o.InterruptPin > 4 {
		return nil, fmt.Errorf("virtio/pci: interrupt pin %d is not 1 to 4", o.InterruptPin)
	}
	if o.InterruptPin == 0 {
		o.InterruptPin = 1
	}
	if o.CloseWait == 0 {
		o.CloseWait = 5 * time.Second
	}
	o.Logger = ratelog.New(o.Logger) // one limit for all of the device
	f := &Function{host: host, opts: o, log: o.Logger, id: dev.ID()}
	var features uint64
	if o.AccessPlatform {
		features |= virtio.FeatureAccessPlatform
	}
	core, err := virtio.NewCore(dev, mem, virtio.CoreOptions{
		Features:        features,
		QueueInterrupt:  f.queueInterrupt,
		ConfigInterrupt: f.configInterrupt,
		OnReset:         f.resetTransport,
		Logger:          o.Logger,
	})
	if err != nil {
		return nil, err
	}
	f.core = core
	n := core.NumQueues()
	if n > maxQueues {
		core.Close(context.Background())
		return nil, fmt.Errorf("virtio/pci: %d queues are more than %d", n, maxQueues)
	}
	f.barSize = 1 << bits.Len64(uint64(notifyOff+notifyMultiplier*max(n, 1)-1))
	if err := f.msix.init(host, n+1); err != nil {
		core.Close(context.Background())
		return nil, err
	}
	f.common.init(n)
	f.bar.init(n)
	f.initConfig()
	f.updateMaster()
	return f, nil
}

// BARs lists the base address registers.
func (f *Function) BARs() []BAR { return []BAR{{Index: 0, Size: f.barSize, Is64: true}} }

// Core gives access to the state that all transports share.
func (f *Function) Core() *virtio.Core { return f.core }

// Reset is a machine reset: the device stops and the configuration space
// returns to its power-on state.
func (f *Function) Reset() {
	ctx, cancel := context.WithTimeout(context.Background(), f.opts.CloseWait)
	defer cancel()
	if err := f.core.Reset(ctx); err != nil {
		f.log.Warn("virtio/pci: machine reset while requests are in flight", "device", f.id, "error", err)
	}
	f.msix.reset()
	f.initConfig()
	f.updateMaster()
	f.updateBAR()
	f.updateINTx()
}

// resetTransport is what a device reset means for this transport.
func (f *Function) resetTransport() {
	f.common.reset()
	f.isr.bits.Store(0)
	f.updateINTx()
}

// Close stops the device and releases doorbells and interrupts. When requests
// in flight do not end in time it returns an error, and guest memory must stay
// mapped, because the device's backend may still use it. It may be called
// again.
func (f *Function) Close() error {
	f.bar.place(f, 0, false)
	ctx, cancel := context.WithTimeout(context.Background(), f.opts.CloseWait)
	defer cancel()
	return errors.Join(f.core.Close(ctx), f.msix.close())
}

// isr is the ISR status register with the INTx line that follows it.
type isr struct {
	bits  atomic.Uint32 // 1: queue, 2: configuration
	mu    sync.Mutex
	level bool
}

const (
	isrQueue  = 1
	isrConfig = 2
)

// queueInterrupt and configInterrupt are called by the core.
func (f *Function) queueInterrupt(i int) {
	if f.msix.enabled() {
		f.msix.signal(f.common.queueVector(i))
		return
	}
	f.isr.bits.Or(isrQueue)
	f.updateINTx()
}

func (f *Function) configInterrupt() {
	f.isr.bits.Or(isrConfig)
	if f.msix.enabled() {
		f.msix.signal(f.common.configVector())
		return
	}
	f.updateINTx()
}

// updateINTx makes the legacy line follow the ISR register. It is high only
// while MSI-X is off and INTx is not disabled.
func (f *Function) updateINTx() {
	f.isr.mu.Lock()
	defer f.isr.mu.Unlock()
	level := f.isr.bits.Load() != 0 && !f.msix.enabled() && !f.cfg.intxDisabled()
	if level != f.isr.level {
		f.isr.level = level
		f.host.SetINTx(level)
	}
}
