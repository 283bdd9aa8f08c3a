package virtio

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moovm/moovm/internal/ratelog"
)

// FeatureValidator is a Device that wants a say in which subset of its
// features a driver may accept. An error refuses FEATURES_OK.
type FeatureValidator interface {
	ValidateFeatures(features uint64) error
}

// CoreOptions connect a Core to its transport.
type CoreOptions struct {
	// Features are offered in addition to those of the device and of the
	// Core itself.
	Features uint64
	// QueueInterrupt tells the driver that queue i has used buffers. It is
	// called from any goroutine, and never once the device is reset.
	QueueInterrupt func(i int)
	// ConfigInterrupt tells the driver about a configuration change.
	ConfigInterrupt func()
	// OnReset, if set, resets what the transport keeps itself. It is called
	// when everything has drained, before Status reads 0, and must not call
	// the Core.
	OnReset func()
	// ResetWait bounds how long SetStatus(0) and ResetQueue block for
	// requests in flight; after it the reset goes on in the background and
	// the driver sees it unfinished. 0 means one second.
	ResetWait time.Duration
	// Logger receives what is worth knowing about a misbehaving driver, at a
	// bounded rate; nil discards it.
	Logger *slog.Logger
}

// Core is the part of a virtio device that all transports share: status,
// features, queue configuration and the goroutines that serve the queues.
//
//	          SetStatus            SetStatus               SetStatus
//	reset ──▶ ACK|DRIVER ──▶ FEATURES_OK (checked) ──▶ DRIVER_OK (queues run)
//	  ▲                          queues are configured        │ broken ring, or an
//	  │                                                       ▼ invalid queue
//	  └──── drained ◀── resetting ◀── SetStatus(0) ◀──── NEEDS_RESET
//
// The features of the driver can change until FEATURES_OK, the configuration
// of a queue from there to DRIVER_OK and while the queue is not enabled; other
// writes are ignored. All methods are safe for concurrent use.
type Core struct {
	dev  Device
	mem  *Memory
	opts CoreOptions
	log  *slog.Logger

	offered uint64
	kicks   []*Event

	status     atomic.Uint32 // written under mu, or by a failing queue
	generation atomic.Uint32
	quiet      atomic.Bool // no more interrupts: resetting or reset

	mu        sync.Mutex
	driver    uint64 // features the driver has accepted
	queues    []coreQueue
	active    bool          // the device is activated
	suspended bool          // queues are not served, and none starts
	noDMA     bool          // nor while the transport may not touch memory
	resetted  chan struct{} // a reset is going on; closed at its end
	closed    bool
}

// coreQueue is a queue's registers and, while it runs, its server.
type coreQueue struct {
	cfg       QueueConfig
	run       *QueueRun
	awaited   bool // a goroutine restarts run when it has ended
	resetting bool // driver-initiated queue reset
	dead      bool // not to be served: given up, also when the state was taken, or never startable
}

// NewCore makes the shared part of a device on mem. The Core owns dev until
// Close.
func NewCore(dev Device, mem *Memory, o CoreOptions) (*Core, error) {
	if o.QueueInterrupt == nil || o.ConfigInterrupt == nil {
		return nil, errors.New("virtio: CoreOptions need QueueInterrupt and ConfigInterrupt")
	}
	if o.ResetWait == 0 {
		o.ResetWait = time.Second
	}
	c := &Core{dev: dev, mem: mem, opts: o, log: ratelog.New(o.Logger)}
	c.offered = dev.Features() | o.Features |
		FeatureVersion1 | FeatureIndirectDesc | FeatureEventIdx | FeatureRingReset
	c.quiet.Store(true)
	for i, n := range dev.QueueSizes() {
		if n == 0 || n&(n-1) != 0 || n > MaxQueueSize {
			c.closeKicks()
			return nil, fmt.Errorf("virtio: size %d of queue %d is not a power of two up to %d", n, i, MaxQueueSize)
		}
		ev, err := NewEvent()
		if err != nil {
			c.closeKicks()
			return nil, err
		}
		c.kicks = append(c.kicks, ev)
		c.queues = append(c.queues, coreQueue{cfg: QueueConfig{MaxSize: n, Size: n}})
	}
	return c, nil
}

func (c *Core) closeKicks() {
	for _, ev := range c.kicks {
		ev.Close()
	}
}

// DeviceID is the device type.
func (c *Core) DeviceID() uint32 { return c.dev.ID() }

// NumQueues is the number of queues the device has.
func (c *Core) NumQueues() int { return len(c.queues) }

// Kick is the event that notifies queue i; nil if there is no such queue. It
// is the same one for the life of the Core.
func (c *Core) Kick(i int) *Event {
	if i < 0 || i >= len(c.kicks) {
		return nil
	}
	return c.kicks[i]
}

// OfferedFeatures are all feature bits the driver may accept.
func (c *Core) OfferedFeatures() uint64 { return c.offered }

// DeviceFeatures is the 32-bit window sel of the offered features; 0 from
// window 2 on.
func (c *Core) DeviceFeatures(sel uint32) uint32 {
	if sel > 1 {
		return 0
	}
	return uint32(c.offered >> (32 * sel))
}

// DriverFeatures reads back a window of what the driver has accepted.
func (c *Core) DriverFeatures(sel uint32) uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if sel > 1 {
		return 0
	}
	return uint32(c.driver >> (32 * sel))
}

// SetDriverFeatures writes a window of the features the driver accepts. It is
// ignored once FEATURES_OK is set. A bit in a window that does not exist is
// one that was not offered, which FEATURES_OK will refuse.
func (c *Core) SetDriverFeatures(sel, v uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Status()&StatusFeaturesOK != 0 || c.resetted != nil {
		return
	}
	switch {
	case sel > 1:
		if v != 0 {
			c.driver |= 1 << 63 // reserved: never offered
		}
	default:
		c.driver = c.driver&^(uint64(0xffffffff)<<(32*sel)) | uint64(v)<<(32*sel)
	}
}

// Status is the device status register.
func (c *Core) Status() uint8 { return uint8(c.status.Load()) }

// ConfigGeneration changes whenever the device changes its configuration
// space by itself.
func (c *Core) ConfigGeneration() uint32 { return c.generation.Load() }

// ReadConfig reads the device configuration space.
func (c *Core) ReadConfig(off uint32, p []byte) { c.dev.ReadConfig(off, p) }

// WriteConfig writes the device configuration space.
func (c *Core) WriteConfig(off uint32, p []byte) { c.dev.WriteConfig(off, p) }

// ConfigChanged implements ConfigNotifier.
func (c *Core) ConfigChanged() {
	c.generation.Add(1)
	if !c.quiet.Load() {
		c.opts.ConfigInterrupt()
	}
}

// SetStatus writes the device status register. The driver can only set bits;
// writing 0 resets the device, which waits for the requests in flight.
func (c *Core) SetStatus(v uint8) {
	if v == 0 {
		ctx, cancel := context.WithTimeout(context.Background(), c.opts.ResetWait)
		defer cancel()
		if c.Reset(ctx) != nil {
			c.log.Warn("virtio: reset waits for requests in flight", "device", c.dev.ID())
		}
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.resetted != nil || c.closed {
		return
	}
	set := v &^ c.Status() &^ StatusNeedsReset // only the device sets that one
	if set&StatusFeaturesOK != 0 {
		if err := c.validateFeatures(); err != nil {
			c.log.Warn("virtio: features refused", "device", c.dev.ID(), "error", err)
			set &^= StatusFeaturesOK
		}
	}
	ok := set&StatusDriverOK != 0 && (c.Status()|set)&StatusFeaturesOK != 0
	if !ok {
		set &^= StatusDriverOK
	}
	c.status.Or(uint32(set))
	if ok {
		c.activate()
	}
}

func (c *Core) validateFeatures() error {
	switch extra := c.driver &^ c.offered; {
	case extra != 0:
		return fmt.Errorf("virtio: feature bits %#x were not offered", extra)
	case c.driver&FeatureVersion1 == 0:
		return errors.New("virtio: VERSION_1 is required")
	case c.offered&^c.driver&FeatureAccessPlatform != 0:
		return errors.New("virtio: ACCESS_PLATFORM is required where it is offered")
	}
	if fv, ok := c.dev.(FeatureValidator); ok {
		return fv.ValidateFeatures(c.driver)
	}
	return nil
}

// activate starts the device; mu is held.
func (c *Core) activate() {
	c.quiet.Store(false)
	c.active = true
	if err := c.dev.Activate(c.driver, c); err != nil {
		for i := range c.queues {
			c.queues[i].dead = true
		}
		c.fail(err)
		return
	}
	for i := range c.queues {
		if c.queues[i].cfg.Ready && !c.held() {
			c.start(i)
		}
	}
}

// start serves an enabled queue; mu is held.
func (c *Core) start(i int) {
	q, err := c.queues[i].cfg.Activate(c.mem, c.driver, c.kicks[i], func() {
		if !c.quiet.Load() {
			c.opts.QueueInterrupt(i)
		}
	})
	if err != nil {
		c.queues[i].dead = true
		c.fail(fmt.Errorf("queue %d: %w", i, err))
		return
	}
	c.queues[i].run = q.Run(c.dev, i, func(err error) { c.fail(fmt.Errorf("queue %d: %w", i, err)) })
}

// fail puts the device into NEEDS_RESET and says so to the driver (section
// 2.1.2). A device being reset needs no telling.
func (c *Core) fail(err error) {
	if c.quiet.Load() {
		return
	}
	c.log.Warn("virtio: device needs a reset", "device", c.dev.ID(), "error", err)
	if c.status.Or(uint32(StatusNeedsReset))&uint32(StatusNeedsReset) == 0 {
		c.opts.ConfigInterrupt()
	}
}

// Reset stops the device: it waits for the requests in flight, then returns
// everything to its initial state, after which Status is 0 and neither rings
// nor interrupts are touched. If ctx ends first it returns ctx's error and the
// reset goes on in the background; Status stays as it is until it is done.
func (c *Core) Reset(ctx context.Context) error {
	c.mu.Lock()
	if c.resetted == nil {
		c.beginReset()
	}
	done := c.resetted
	c.mu.Unlock()
	if done == nil {
		return nil // nothing was in flight
	}
	select {
	case <-done: // looked at first: ctx may have ended, too
		return nil
	default:
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// beginReset stops the queues and has the rest done when they have drained;
// mu is held.
func (c *Core) beginReset() {
	c.resetted = make(chan struct{})
	var runs []*QueueRun
	for i := range c.queues {
		if r := c.queues[i].run; r != nil {
			r.Stop()
			runs = append(runs, r)
		}
	}
	if len(runs) == 0 {
		c.finishReset()
		return
	}
	go func() {
		for _, r := range runs {
			<-r.Done()
			r.Release()
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.finishReset()
	}()
}

func (c *Core) finishReset() {
	c.quiet.Store(true)
	if c.active {
		c.active = false
		c.dev.Reset()
	}
	c.driver = 0
	for i := range c.queues {
		c.queues[i] = coreQueue{cfg: initialQueue(c.queues[i].cfg.MaxSize)}
	}
	if c.opts.OnReset != nil {
		c.opts.OnReset()
	}
	c.status.Store(0)
	close(c.resetted)
	c.resetted = nil
}

func initialQueue(maxSize uint16) QueueConfig { return QueueConfig{MaxSize: maxSize, Size: maxSize} }

// Queue returns the configuration of queue i as the driver has programmed it;
// the zero QueueConfig if there is no such queue.
func (c *Core) Queue(i int) QueueConfig {
	c.mu.Lock()
	defer c.mu.Unlock()
	if i < 0 || i >= len(c.queues) {
		return QueueConfig{}
	}
	return c.queues[i].cfg
}

// ConfigureQueue lets set change size and addresses of queue i. It is ignored
// outside the time when the driver may do so, or if there is no such queue.
func (c *Core) ConfigureQueue(i int, set func(*QueueConfig)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if q := c.configurable(i); q != nil && !q.cfg.Ready {
		set(&q.cfg)
	}
}

// configurable returns queue i if it may be configured now: between
// FEATURES_OK and DRIVER_OK, or later when it has been reset on its own.
func (c *Core) configurable(i int) *coreQueue {
	if i < 0 || i >= len(c.queues) || c.resetted != nil || c.closed || c.Status()&StatusFeaturesOK == 0 {
		return nil
	}
	if c.active && c.driver&FeatureRingReset == 0 {
		return nil
	}
	q := &c.queues[i]
	if q.run != nil || q.resetting {
		return nil
	}
	return q
}

// EnableQueue enables queue i. After DRIVER_OK, with RING_RESET negotiated, it
// starts right away.
func (c *Core) EnableQueue(i int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	q := c.configurable(i)
	if q == nil || q.cfg.Ready {
		return
	}
	q.cfg.Ready = true
	if c.active && !c.held() && c.Status()&StatusNeedsReset == 0 {
		c.start(i)
	}
}

// DisableQueue undoes EnableQueue. A running queue drains first and loses its
// configuration, as with ResetQueue.
func (c *Core) DisableQueue(i int) {
	c.mu.Lock()
	if q := c.configurable(i); q != nil && !c.active {
		q.cfg.Ready = false
	}
	active := c.active
	c.mu.Unlock()
	if active {
		c.drainQueue(i)
	}
}

// ResetQueue resets queue i on its own (RING_RESET, section 2.6.1): it waits
// for the queue's requests in flight, at most CoreOptions.ResetWait, and
// returns its registers to their initial state.
func (c *Core) ResetQueue(i int) {
	c.mu.Lock()
	ok := c.driver&FeatureRingReset != 0
	c.mu.Unlock()
	if ok {
		c.drainQueue(i)
	}
}

func (c *Core) drainQueue(i int) {
	c.mu.Lock()
	if i < 0 || i >= len(c.queues) || c.resetted != nil || !c.active || c.queues[i].resetting {
		c.mu.Unlock()
		return
	}
	q := &c.queues[i]
	r := q.run
	if r == nil {
		*q = coreQueue{cfg: initialQueue(q.cfg.MaxSize)}
		c.mu.Unlock()
		return
	}
	q.resetting = true
	r.Stop()
	c.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-r.Done()
		r.Release()
		c.mu.Lock()
		defer c.mu.Unlock()
		if q.run == r { // else a device reset came first
			*q = coreQueue{cfg: initialQueue(q.cfg.MaxSize)}
		}
	}()
	t := time.NewTimer(c.opts.ResetWait)
	defer t.Stop()
	select {
	case <-done:
	case <-t.C:
		c.log.Warn("virtio: queue reset waits for requests in flight", "device", c.dev.ID(), "queue", i)
	}
}

// QueueResetting reports whether a reset of queue i is still going on.
func (c *Core) QueueResetting(i int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return i >= 0 && i < len(c.queues) && c.queues[i].resetting
}

// Close resets the device for good and releases the kick events. If ctx ends
// before the requests in flight do, Close returns its error: the rings are not
// touched any more, but the device's backend may still use guest memory, which
// must then stay mapped. Close may be called again, to wait again.
func (c *Core) Close(ctx context.Context) error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	if err := c.Reset(ctx); err != nil {
		c.quiet.Store(true)
		c.mu.Lock()
		for i := range c.queues {
			if r := c.queues[i].run; r != nil {
				r.Release()
			}
		}
		c.mu.Unlock()
		return fmt.Errorf("virtio: requests in flight do not end: %w", err)
	}
	c.closeKicks()
	return nil
}
