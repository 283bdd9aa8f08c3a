package mmio

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/moovm/moovm/internal/ratelog"
	"github.com/moovm/moovm/virtio"
)

// Size is the number of bytes of the window.
const Size = 0x1000

// QueueNotify is the offset of the register whose writes a Binder routes.
const QueueNotify = regQueueNotify

// Offsets of the registers (section 4.2.2). All but the configuration space
// are 32 bits wide and are accessed as such.
const (
	regMagic             = 0x000
	regVersion           = 0x004
	regDeviceID          = 0x008
	regVendorID          = 0x00c
	regDeviceFeatures    = 0x010
	regDeviceFeaturesSel = 0x014
	regDriverFeatures    = 0x020
	regDriverFeaturesSel = 0x024
	regQueueSel          = 0x030
	regQueueSizeMax      = 0x034
	regQueueSize         = 0x038
	regQueueReady        = 0x044
	regQueueNotify       = 0x050
	regInterruptStatus   = 0x060
	regInterruptACK      = 0x064
	regStatus            = 0x070
	regQueueDesc         = 0x080
	regQueueDriver       = 0x090
	regQueueDevice       = 0x0a0
	regSHMLen            = 0x0b0 // and base: 16 bytes of ones, there is none
	regQueueReset        = 0x0c0
	regGeneration        = 0x0fc
	regConfig            = 0x100

	magic    = 0x74726976 // "virt"
	version  = 2
	vendorID = 0x766f6f6d // "moov"

	intQueue  = 1
	intConfig = 2
)

// Host is what a Device asks of its machine. Its methods may be called from
// any goroutine, also while the machine calls the Device.
type Host interface {
	// SetInterrupt sets the level of the device's interrupt line. It is
	// called with true for every new cause, also while the line is high, so
	// a machine whose interrupts are edges pulses on every such call.
	SetInterrupt(level bool)
}

// Binder is a Host that can route notifications past the Device
// (KVM_IOEVENTFD with a data match).
type Binder interface {
	// BindNotify makes a 32-bit guest write of the value queue to the
	// QueueNotify register (offset 0x50 of the window) signal ev.
	BindNotify(queue int, ev *virtio.Event) error
	// UnbindNotify undoes it.
	UnbindNotify(queue int, ev *virtio.Event) error
}

// Options are the choices a machine has; the zero value is good for most.
type Options struct {
	// AccessPlatform offers VIRTIO_F_ACCESS_PLATFORM.
	AccessPlatform bool
	// CloseWait bounds how long Reset and Close wait for requests in
	// flight; 0 means 5 seconds.
	CloseWait time.Duration
	// Logger receives what is worth knowing about a misbehaving driver;
	// nil discards it.
	Logger *slog.Logger
}

// Device is a virtio device behind a window of registers. Its methods are safe
// for concurrent use by several vCPUs.
type Device struct {
	core  *virtio.Core
	host  Host
	opts  Options
	bound int // queues whose notifications are bound

	mu         sync.Mutex // not held while the core is called
	deviceSel  uint32
	driverSel  uint32
	queueSel   uint32
	interrupts uint32
}

// New puts dev behind a window of registers. The Device owns dev's queues from
// now on; Close releases them.
func New(dev virtio.Device, mem *virtio.Memory, host Host, o Options) (*Device, error) {
	if o.CloseWait == 0 {
		o.CloseWait = 5 * time.Second
	}
	o.Logger = ratelog.New(o.Logger) // one limit for all of the device
	d := &Device{host: host, opts: o}
	var features uint64
	if o.AccessPlatform {
		features |= virtio.FeatureAccessPlatform
	}
	core, err := virtio.NewCore(dev, mem, virtio.CoreOptions{
		Features:        features,
		QueueInterrupt:  func(int) { d.interrupt(intQueue) },
		ConfigInterrupt: func() { d.interrupt(intConfig) },
		OnReset:         d.resetTransport,
		Logger:          o.Logger,
	})
	if err != nil {
		return nil, err
	}
	d.core = core
	if b, ok := host.(Binder); ok {
		for i := range core.NumQueues() {
			if err := b.BindNotify(i, core.Kick(i)); err != nil {
				return nil, errors.Join(fmt.Errorf("virtio/mmio: notification of queue %d: %w", i, err), d.Close())
			}
			d.bound++
		}
	}
	return d, nil
}

// Core gives access to the state that all transports share.
func (d *Device) Core() *virtio.Core { return d.core }

// Reset is a machine reset.
func (d *Device) Reset() {
	ctx, cancel := context.WithTimeout(context.Background(), d.opts.CloseWait)
	defer cancel()
	if err := d.core.Reset(ctx); err != nil {
		d.opts.Logger.Warn("virtio/mmio: machine reset while requests are in flight", "device", d.core.DeviceID(), "error", err)
	}
}

// Close stops the device and releases its notifications. When requests in
// flight do not end in time it returns an error, and guest memory must stay
// mapped, because the device's backend may still use it. It may be called
// again.
func (d *Device) Close() error {
	var errs []error
	if b, ok := d.host.(Binder); ok {
		for ; d.bound > 0; d.bound-- {
			errs = append(errs, b.UnbindNotify(d.bound-1, d.core.Kick(d.bound-1)))
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), d.opts.CloseWait)
	defer cancel()
	return errors.Join(append(errs, d.core.Close(ctx))...)
}

func (d *Device) resetTransport() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.deviceSel, d.driverSel, d.queueSel = 0, 0, 0
	if d.interrupts != 0 {
		d.interrupts = 0
		d.host.SetInterrupt(false)
	}
}

// interrupt adds a cause, which holds until the driver acknowledges it.
func (d *Device) interrupt(cause uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.interrupts |= cause
	d.host.SetInterrupt(true)
}

// Read serves a guest read of len(p) bytes at an offset in the window. Beyond
// the window, and for accesses that are not 32 bits wide, it reads zeros.
func (d *Device) Read(off uint64, p []byte) {
	clear(p)
	switch {
	case off >= Size || uint64(len(p)) > Size-off:
	case off >= regConfig:
		d.core.ReadConfig(uint32(off-regConfig), p)
	case len(p) == 4 && off%4 == 0:
		binary.LittleEndian.PutUint32(p, d.register(uint32(off)))
	}
}

func (d *Device) register(off uint32) uint32 {
	d.mu.Lock()
	deviceSel, driverSel, queue, ints := d.deviceSel, d.driverSel, d.queueSel, d.interrupts
	d.mu.Unlock()
	switch off {
	case regMagic:
		return magic
	case regVersion:
		return version
	case regDeviceID:
		return d.core.DeviceID()
	case regVendorID:
		return vendorID
	case regDeviceFeatures:
		return d.core.DeviceFeatures(deviceSel)
	case regDriverFeatures:
		return d.core.DriverFeatures(driverSel) // write-only, so anything goes
	case regQueueSizeMax:
		return uint32(d.queue(queue).MaxSize)
	case regQueueReady:
		if d.queue(queue).Ready {
			return 1
		}
	case regQueueReset:
		if queue < 1<<16 && d.core.QueueResetting(int(queue)) {
			return 1
		}
	case regInterruptStatus:
		return ints
	case regStatus:
		return uint32(d.core.Status())
	case regGeneration:
		return d.core.ConfigGeneration()
	case regSHMLen, regSHMLen + 4, regSHMLen + 8, regSHMLen + 12:
		return 0xffffffff
	}
	return 0
}

func (d *Device) queue(i uint32) virtio.QueueConfig {
	if i >= 1<<16 {
		return virtio.QueueConfig{}
	}
	return d.core.Queue(int(i))
}

// Write serves a guest write at an offset in the window. Beyond the window,
// and for accesses that are not 32 bits wide, it does nothing.
func (d *Device) Write(off uint64, p []byte) {
	switch {
	case off >= Size || uint64(len(p)) > Size-off:
	case off >= regConfig:
		d.core.WriteConfig(uint32(off-regConfig), p)
	case len(p) == 4 && off%4 == 0:
		d.setRegister(uint32(off), binary.LittleEndian.Uint32(p))
	}
}

func (d *Device) setRegister(off, v uint32) {
	d.mu.Lock()
	driverSel, queue := d.driverSel, int(min(d.queueSel, 1<<16)) // a queue there never is
	switch off {
	case regDeviceFeaturesSel:
		d.deviceSel = v
	case regDriverFeaturesSel:
		d.driverSel = v
	case regQueueSel:
		d.queueSel = v
	case regInterruptACK:
		d.interrupts &^= v
		d.host.SetInterrupt(d.interrupts != 0)
	}
	d.mu.Unlock()
	switch off {
	case regDriverFeatures:
		d.core.SetDriverFeatures(driverSel, v)
	case regQueueSize:
		// Too large for a queue, but not to be mistaken for one that is not.
		d.core.ConfigureQueue(queue, func(q *virtio.QueueConfig) { q.Size = uint16(min(v, 0xffff)) })
	case regQueueReady:
		switch {
		case v == 1:
			d.core.EnableQueue(queue)
		case v == 0:
			d.core.DisableQueue(queue)
		}
	case regQueueReset:
		if v == 1 {
			d.core.ResetQueue(queue)
		}
	case regQueueNotify:
		if ev := d.core.Kick(int(min(v, 1<<16))); ev != nil {
			ev.Signal() // fails only when the device is closed
		}
	case regStatus:
		// Only the low byte exists; a driver that writes others writes 0 only
		// if it is 0.
		if v == 0 || v&0xff != 0 {
			d.core.SetStatus(uint8(v))
		}
	case regQueueDesc, regQueueDesc + 4, regQueueDriver, regQueueDriver + 4, regQueueDevice, regQueueDevice + 4:
		d.core.ConfigureQueue(queue, func(q *virtio.QueueConfig) {
			a := [...]*uint64{&q.Desc, &q.Driver, &q.Device}[(off-regQueueDesc)/16]
			shift := off % 8 * 8
			*a = *a&^(0xffffffff<<shift) | uint64(v)<<shift
		})
	}
}
