package virtio

import (
	"context"
	"errors"
	"fmt"
)

// ErrState says that a state does not fit a device.
var ErrState = errors.New("virtio: the state does not fit the device")

// StateKeeper is a Device with state that its driver could notice and that the
// transport does not see: a cache mode, open files. Both methods are called
// while no queue is served.
type StateKeeper interface {
	// State returns the device's state as bytes that only the device reads.
	State() ([]byte, error)
	// SetState puts a state back, after Activate if the driver was ready. p
	// may come from anybody: an error must leave nothing behind.
	SetState(p []byte) error
}

// CoreState is the state of a suspended Core: plain data.
type CoreState struct {
	ID         uint32 // device type
	Status     uint8
	Features   uint64 // that the driver has accepted
	Generation uint32
	Queues     []QueueState
	Device     []byte `json:",omitempty"` // a StateKeeper's
}

// QueueState is the state of a queue that is not served.
type QueueState struct {
	Size                 uint16
	Desc, Driver, Device uint64
	Ready                bool
	// Broken queues are not served until they are reset.
	Broken                bool `json:",omitempty"`
	AvailIndex, UsedIndex uint16
}

// Suspend lets the queues finish the requests they have begun and serves them
// no further, until Resume. If ctx ends first it returns ctx's error, and the
// queues go on as if nothing had been asked.
//
// The transport must keep the driver from the registers meanwhile; a reset is
// possible.
func (c *Core) Suspend(ctx context.Context) error {
	c.mu.Lock()
	if c.resetted != nil {
		c.mu.Unlock()
		return errors.New("virtio: a device that is being reset cannot be suspended")
	}
	c.suspended = true
	c.stopQueues()
	c.mu.Unlock()
	if err := c.Drain(ctx); err != nil {
		c.Resume()
		return err
	}
	return nil
}

// held reports whether something keeps the queues from being served; mu is
// held.
func (c *Core) held() bool { return c.suspended || c.noDMA }

// stopQueues has the queues take no further requests; mu is held.
func (c *Core) stopQueues() {
	for i := range c.queues {
		if r := c.queues[i].run; r != nil && !c.queues[i].resetting {
			r.Stop()
		}
	}
}

// SetDMA says whether the transport lets the device access memory (the bus
// master bit of a PCI function). While it may not, no queue is served; then
// they go on from where they were. It does not wait for the requests that have
// begun: Drain does. It is independent of Suspend, and survives a reset.
func (c *Core) SetDMA(on bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.noDMA == !on {
		return
	}
	c.noDMA = !on
	if on {
		c.restartQueues()
	} else {
		c.stopQueues()
	}
}

// Drain waits until the queues that are to stop have finished what they had
// begun. If ctx ends first it returns ctx's error.
func (c *Core) Drain(ctx context.Context) error {
	c.mu.Lock()
	var runs []*QueueRun
	for i := range c.queues {
		if r := c.queues[i].run; r != nil && !c.queues[i].resetting && r.Stopped() {
			runs = append(runs, r)
		}
	}
	c.mu.Unlock()
	for _, r := range runs {
		select {
		case <-r.Done():
		case <-ctx.Done():
			return fmt.Errorf("virtio: requests in flight do not end: %w", ctx.Err())
		}
	}
	return nil
}

// Resume serves the queues again, from where they were. A queue that has not
// finished what it had begun goes on when it has.
func (c *Core) Resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.suspended {
		return
	}
	c.suspended = false
	c.restartQueues()
}

// restartQueues serves the queues again, unless something else keeps them from
// it; mu is held.
func (c *Core) restartQueues() {
	if c.held() {
		return
	}
	for i := range c.queues {
		r := c.queues[i].run
		if r == nil {
			c.restart(i, nil)
			continue
		}
		if r.Ended() {
			c.restart(i, r)
			continue
		}
		if c.queues[i].awaited {
			continue // whoever asks often gets one goroutine
		}
		c.queues[i].awaited = true
		go func() {
			<-r.Done()
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.queues[i].run == r {
				c.queues[i].awaited = false
				c.restart(i, r)
			}
		}()
	}
}

// restart serves queue i on from where r, which has ended, left it; nil is a
// queue that was given a state. mu is held.
func (c *Core) restart(i int, r *QueueRun) {
	q := &c.queues[i]
	if c.closed || c.resetted != nil || !c.active || c.held() || // it is up to somebody else now
		q.resetting || !q.cfg.Ready || q.run != r || q.broken() || r != nil && !r.Stopped() {
		return
	}
	if r != nil {
		q.cfg.AvailIndex, q.cfg.UsedIndex = r.Position()
		r.Release()
		q.run, q.awaited = nil, false
	}
	c.start(i)
}

// broken reports whether the queue's server has given it up.
func (q *coreQueue) broken() bool {
	if q.run == nil {
		return q.dead
	}
	return q.run.Broken()
}

// State returns the state of a suspended Core.
func (c *Core) State() (CoreState, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.suspended {
		return CoreState{}, errors.New("virtio: the state of a device that is not suspended")
	}
	s := CoreState{ID: c.dev.ID(), Status: c.Status(), Features: c.driver, Generation: c.generation.Load()}
	for i := range c.queues {
		q := &c.queues[i]
		qs := QueueState{
			Size: q.cfg.Size, Desc: q.cfg.Desc, Driver: q.cfg.Driver, Device: q.cfg.Device, Ready: q.cfg.Ready,
			Broken: q.broken(), AvailIndex: q.cfg.AvailIndex, UsedIndex: q.cfg.UsedIndex,
		}
		if q.run != nil {
			qs.AvailIndex, qs.UsedIndex = q.run.Position()
		}
		s.Queues = append(s.Queues, qs)
	}
	if k, ok := c.dev.(StateKeeper); ok {
		var err error
		if s.Device, err = k.State(); err != nil {
			return CoreState{}, err
		}
	}
	return s, nil
}

// SetState puts a state into a fresh or a suspended Core, which is suspended
// afterwards: Resume serves the queues. What the state says about guest memory
// is checked when it is used, as everything that a driver writes.
//
// Interrupts and notifications are not state: after Resume the transport
// raises each queue's interrupt once, and each queue looks at its ring.
func (c *Core) SetState(s CoreState) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed || c.resetted != nil:
		return errors.New("virtio: the device is closed or being reset")
	case !c.suspended && c.Status() != 0:
		return errors.New("virtio: a device in use must be suspended before it gets a state")
	case s.ID != c.dev.ID():
		return fmt.Errorf("%w: it is of a device of type %d, this one has type %d", ErrState, s.ID, c.dev.ID())
	case len(s.Queues) != len(c.queues):
		return fmt.Errorf("%w: it has %d queues, the device %d", ErrState, len(s.Queues), len(c.queues))
	case s.Features&^c.offered != 0:
		return fmt.Errorf("%w: the driver uses feature bits %#x, which the device does not have", ErrState, s.Features&^c.offered)
	case s.Status&StatusDriverOK != 0 && s.Status&StatusFeaturesOK == 0:
		return fmt.Errorf("%w: status %#x cannot be", ErrState, s.Status)
	}
	for i := range c.queues {
		if s.Queues[i].Size > c.queues[i].cfg.MaxSize {
			return fmt.Errorf("%w: queue %d has size %d, the device's at most %d", ErrState, i, s.Queues[i].Size, c.queues[i].cfg.MaxSize)
		}
	}
	c.suspended = true
	c.forget()
	return c.remember(s)
}

// forget drops what a suspended device was doing; mu is held.
func (c *Core) forget() {
	for i := range c.queues {
		if r := c.queues[i].run; r != nil {
			r.Release()
		}
		c.queues[i] = coreQueue{cfg: initialQueue(c.queues[i].cfg.MaxSize)}
	}
	if c.active {
		c.active = false
		c.dev.Reset()
	}
	c.status.Store(0)
	c.driver = 0
}

// remember is the second half of SetState; mu is held. After an error the
// device is as after a reset.
func (c *Core) remember(s CoreState) error {
	c.driver = s.Features
	c.generation.Store(s.Generation)
	for i := range c.queues {
		q, from := &c.queues[i], s.Queues[i]
		q.cfg.Size, q.cfg.Desc, q.cfg.Driver, q.cfg.Device = from.Size, from.Desc, from.Driver, from.Device
		q.cfg.Ready, q.cfg.AvailIndex, q.cfg.UsedIndex = from.Ready, from.AvailIndex, from.UsedIndex
		q.dead = from.Broken
	}
	if s.Status&StatusDriverOK != 0 {
		c.active = true
		if err := c.dev.Activate(c.driver, c); err != nil {
			c.forget()
			return err
		}
	}
	if k, ok := c.dev.(StateKeeper); ok {
		if err := k.SetState(s.Device); err != nil {
			c.forget()
			return err
		}
	}
	c.quiet.Store(s.Status&StatusDriverOK == 0)
	c.status.Store(uint32(s.Status))
	return nil
}
