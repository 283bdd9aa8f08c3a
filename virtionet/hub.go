package virtionet

import (
	"container/heap"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"
)

// Faults are what a Hub does to packets. The zero value does nothing.
type Faults struct {
	Loss      float64 // probability that a port does not get a packet
	Duplicate float64 // probability that it gets one twice
	// Delay is how long a packet is under way, Jitter what is added to it at
	// most, so that packets overtake each other.
	Delay, Jitter time.Duration
}

func (f Faults) check() error {
	switch {
	case !(f.Loss >= 0 && f.Loss <= 1):
		return fmt.Errorf("virtionet: Faults.Loss is %v, want 0 to 1", f.Loss)
	case !(f.Duplicate >= 0 && f.Duplicate <= 1):
		return fmt.Errorf("virtionet: Faults.Duplicate is %v, want 0 to 1", f.Duplicate)
	case f.Delay < 0 || f.Jitter < 0:
		return fmt.Errorf("virtionet: Faults.Delay is %v and Jitter %v, want 0 or more", f.Delay, f.Jitter)
	}
	return nil
}

// hubPackets bounds the packets under way in a Hub with a delay; others are
// lost.
const hubPackets = 4096

// Hub is a LAN for tests: what one port sends all others get, with faults.
type Hub struct {
	wake chan struct{} // has room for one
	quit chan struct{}
	done chan struct{}

	mu       sync.Mutex
	rnd      *rand.Rand
	faults   Faults
	ports    []*Port
	cut      map[[2]*Port]bool
	underway deliveries
	serial   uint64
	closed   bool
}

// NewHub returns a hub without ports. What is lost, doubled and delayed
// follows from seed and the order of packets. Close ends it.
func NewHub(seed uint64, f Faults) (*Hub, error) {
	if err := f.check(); err != nil {
		return nil, err
	}
	h := &Hub{
		wake:   make(chan struct{}, 1),
		quit:   make(chan struct{}),
		done:   make(chan struct{}),
		rnd:    rand.New(rand.NewPCG(seed, 0)),
		faults: f,
		cut:    map[[2]*Port]bool{},
	}
	go h.deliver()
	return h, nil
}

// SetFaults changes what happens to the packets from now on.
func (h *Hub) SetFaults(f Faults) error {
	if err := f.check(); err != nil {
		return err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.faults = f
	return nil
}

// Cut keeps two ports from hearing each other, or lets them again; their links
// stay up.
func (h *Hub) Cut(a, b *Port, cut bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if cut {
		h.cut[[2]*Port{a, b}], h.cut[[2]*Port{b, a}] = true, true
		return
	}
	delete(h.cut, [2]*Port{a, b})
	delete(h.cut, [2]*Port{b, a})
}

// Port adds a port.
func (h *Hub) Port() *Port {
	p := &Port{hub: h}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ports = append(h.ports, p)
	return p
}

// Close ends the hub and all its ports. It may be called again.
func (h *Hub) Close() error {
	h.mu.Lock()
	ports, first := h.ports, !h.closed
	h.closed = true
	h.mu.Unlock()
	if first {
		close(h.quit)
	}
	<-h.done
	var errs []error
	for _, p := range ports {
		errs = append(errs, p.Close())
	}
	return errors.Join(errs...)
}

// delivery is a packet on its way to a port.
type delivery struct {
	at     time.Time
	serial uint64 // of two for the same time the first one comes first
	to     *Port
	packet []byte
}

// deliveries is a heap, the next one first.
type deliveries []delivery

func (d deliveries) Len() int { return len(d) }
func (d deliveries) Less(i, j int) bool {
	return d[i].at.Before(d[j].at) || d[i].at.Equal(d[j].at) && d[i].serial < d[j].serial
}
func (d deliveries) Swap(i, j int) { d[i], d[j] = d[j], d[i] }
func (d *deliveries) Push(x any)   { *d = append(*d, x.(delivery)) }
func (d *deliveries) Pop() any {
	old := *d
	x := old[len(old)-1]
	old[len(old)-1] = delivery{}
	*d = old[:len(old)-1]
	return x
}

// send puts a packet on its way to all ports but from.
func (h *Hub) send(from *Port, packet []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return
	}
	f := h.faults
	for _, to := range h.ports {
		if to == from || h.cut[[2]*Port{from, to}] {
			continue
		}
		copies := 1
		if h.rnd.Float64() < f.Loss {
			continue
		}
		if h.rnd.Float64() < f.Duplicate {
			copies = 2
		}
		for range copies {
			wait := f.Delay
			if f.Jitter > 0 {
				wait += time.Duration(h.rnd.Int64N(int64(f.Jitter)))
			}
			if wait == 0 {
				to.receive(packet)
				continue
			}
			if len(h.underway) < hubPackets {
				h.serial++
				heap.Push(&h.underway, delivery{time.Now().Add(wait), h.serial, to, append([]byte(nil), packet...)})
			}
		}
	}
	if len(h.underway) > 0 {
		select {
		case h.wake <- struct{}{}:
		default:
		}
	}
}

// deliver hands over the packets that were delayed.
func (h *Hub) deliver() {
	defer close(h.done)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		next := time.Hour
		h.mu.Lock()
		for len(h.underway) > 0 {
			if next = time.Until(h.underway[0].at); next > 0 {
				break
			}
			d := heap.Pop(&h.underway).(delivery)
			d.to.receive(d.packet)
			next = time.Hour
		}
		h.mu.Unlock()
		timer.Reset(next)
		select {
		case <-h.quit:
			return
		case <-h.wake:
		case <-timer.C:
		}
	}
}

// Port is a place in a Hub to plug a device in, a Link.
type Port struct {
	hub *Hub

	mu     sync.RWMutex // held for reading while r is used
	r      Receiver
	closed bool
}

// Attach implements Link.
func (p *Port) Attach(r Receiver) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.r != nil || p.closed {
		return ErrAttached
	}
	p.r = r
	r.SetLink(true)
	return nil
}

func (p *Port) receive(packet []byte) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.r != nil {
		p.r.Receive(packet)
	}
}

// Send implements Link.
func (p *Port) Send(packet []byte) { p.hub.send(p, packet) }

// SetLink pulls the plug of a port, or puts it in again.
func (p *Port) SetLink(up bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if p.r != nil {
		p.r.SetLink(up)
	}
}

// Offloads implements Link.
func (p *Port) Offloads() Offloads { return Offloads{Checksum: true, Segmentation: true} }

// Close implements Link.
func (p *Port) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.r, p.closed = nil, true
	return nil
}
