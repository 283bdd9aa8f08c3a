package virtionet

import (
	"errors"
	"sync"
)

// ErrAttached says that a link has a device already, or is closed.
var ErrAttached = errors.New("virtionet: the link is in use by another device, or closed")

// PairEnd is one end of a cable between two devices, a Link. Both ends are up
// while both have a device and neither is closed.
type PairEnd struct {
	cable *sync.Mutex // the cable's: taken to attach and to close
	peer  *PairEnd

	mu     sync.RWMutex // held for reading while r is used
	r      Receiver
	closed bool
}

// NewPair returns the two ends of a cable.
func NewPair() (a, b *PairEnd) {
	var mu sync.Mutex
	a, b = &PairEnd{cable: &mu}, &PairEnd{cable: &mu}
	a.peer, b.peer = b, a
	return a, b
}

// Attach implements Link.
func (e *PairEnd) Attach(r Receiver) error {
	e.cable.Lock()
	defer e.cable.Unlock()
	e.mu.Lock()
	if e.r != nil || e.closed {
		e.mu.Unlock()
		return ErrAttached
	}
	e.r = r
	e.mu.Unlock()
	if e.peer.r != nil {
		e.r.SetLink(true)
		e.peer.r.SetLink(true)
	}
	return nil
}

// Send implements Link.
func (e *PairEnd) Send(packet []byte) {
	p := e.peer
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.r != nil {
		p.r.Receive(packet)
	}
}

// Offloads implements Link.
func (e *PairEnd) Offloads() Offloads { return Offloads{Checksum: true, Segmentation: true} }

// Close implements Link: the other end goes down.
func (e *PairEnd) Close() error {
	e.cable.Lock()
	defer e.cable.Unlock()
	e.mu.Lock()
	e.r, e.closed = nil, true
	e.mu.Unlock()
	if e.peer.r != nil {
		e.peer.r.SetLink(false)
	}
	return nil
}
