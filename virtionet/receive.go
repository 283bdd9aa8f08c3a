package virtionet

import (
	"time"

	"github.com/moovm/moovm/virtio"
)

// Receive implements Receiver.
func (d *Device) Receive(packet []byte) bool {
	if len(packet) < HeaderSize+ethHeader || len(packet) > HeaderSize+maxFrame {
		d.pairs[0].counters.rxInvalid.Add(1)
		return false
	}
	p := d.pairs[0]
	if n := uint32(d.active.Load()); n > 1 {
		p = d.pairs[d.flows[flow(packet[HeaderSize:])%flowSlots].Load()%n]
	}
	c := &p.counters
	if !d.running.Load() || !d.up.Load() {
		c.rxDown.Add(1)
		return false
	}
	h, ok := checkHeader(packet, d.offloads, d.mtu)
	if !ok {
		c.rxInvalid.Add(1)
		return false
	}
	if !p.in.push(&h, packet) {
		c.rxFull.Add(1)
		return false
	}
	return true
}

// shortage is how long a packet for which there are some buffers, but too few,
// waits for more.
const shortage = 10 * time.Millisecond

// receiver serves a receive queue (section 5.1.6.4). It always holds a buffer
// before it waits for packets, so that a driver that offers nonsense hears of
// it, and it sleeps in the queue while there is none.
type receiver struct {
	d        *Device
	p        *pair
	q        *virtio.Queue
	features uint64
	held     []*virtio.DescriptorChain // taken and not used yet
	timer    *time.Timer               // wakes the queue when a shortage has lasted
}

func (d *Device) serveReceive(p *pair, q *virtio.Queue) error {
	r := &receiver{d: d, p: p, q: q, features: d.features.Load(), held: make([]*virtio.DescriptorChain, 0, q.Size())}
	r.timer = time.AfterFunc(shortage, q.Wake)
	defer r.timer.Stop()
	defer r.putBack()
	for {
		if ok, err := r.hold(1); !ok {
			return err
		}
		packet := p.in.peek()
		if packet == nil {
			q.Notify()
			select {
			case <-p.in.ready:
			case <-q.Done():
				return nil
			}
			continue
		}
		if ok, err := r.receive(packet); !ok {
			return err
		}
		p.in.pop()
	}
}

// putBack leaves what is held to the next life of the queue.
func (r *receiver) putBack() {
	for i := len(r.held) - 1; i >= 0; i-- {
		if c := r.held[i]; !r.q.PutBack(c) {
			r.q.Push(c)
		}
	}
	r.q.Notify()
}

// hold takes buffers until it holds n bytes, and waits for the first one. It
// reports false when the queue is stopped. There may still be fewer bytes: no
// more came for some time, or the ring holds no more.
func (r *receiver) hold(n int) (ok bool, err error) {
	have := 0
	for _, c := range r.held {
		have += c.Writer().Len()
	}
	var deadline time.Time
	for have < n && len(r.held) < r.q.Size() {
		c, err := r.q.Next()
		switch {
		case err != nil:
			return false, err
		case c == nil:
			r.q.Notify()
			if len(r.held) > 0 {
				now := time.Now()
				if deadline.IsZero() {
					deadline = now.Add(shortage)
					r.timer.Reset(shortage)
				} else if !now.Before(deadline) {
					return true, nil
				}
			}
			if !r.q.Wait() {
				return false, nil
			}
		case c.Writer().Len() < HeaderSize:
			r.q.Push(c) // no buffer for any packet
		default:
			r.held = append(r.held, c)
			have += c.Writer().Len()
		}
	}
	return true, nil
}

// receive puts a packet into the guest's buffers, after doing what the driver
// does not want to do itself.
func (r *receiver) receive(packet []byte) (ok bool, err error) {
	want := FeatureGuestTSO4
	switch packet[hdrGSOType] {
	case gsoTCPv6:
		want = FeatureGuestTSO6
		fallthrough
	case gsoTCPv4:
		if r.features&want != 0 {
			return r.put(packet)
		}
		s := newSegments(packet)
		for n := s.next(r.p.cut); n > 0; n = s.next(r.p.cut) {
			if ok, err := r.put(r.p.cut[:n]); !ok {
				return false, err
			}
		}
		return true, nil
	}
	if packet[hdrFlags]&flagNeedsCsum != 0 && r.features&FeatureGuestCsum == 0 {
		completeChecksum(packet[HeaderSize:], packet)
		clear(packet[:HeaderSize])
	}
	return r.put(packet)
}

// put puts a packet into the next buffer, or with MRG_RXBUF into as many as it
// takes. One that does not fit is dropped, and the buffers stay.
func (r *receiver) put(packet []byte) (ok bool, err error) {
	n, have := 1, 0
	if r.features&FeatureMrgRxBuf != 0 {
		if ok, err := r.hold(len(packet)); !ok {
			return false, err
		}
		for n = 0; n < len(r.held) && have < len(packet); n++ {
			have += r.held[n].Writer().Len()
		}
	} else {
		if ok, err := r.hold(1); !ok {
			return false, err
		}
		have = r.held[0].Writer().Len()
	}
	c := &r.p.counters
	if have < len(packet) {
		c.rxTooLong.Add(1)
		return true, nil
	}
	le.PutUint16(packet[hdrNumBuffers:], uint16(n))
	for rest, i := packet, 0; len(rest) > 0; i++ {
		w := r.held[i].Writer()
		m, _ := w.Write(rest[:min(len(rest), w.Len())]) // they fit
		rest = rest[m:]
	}
	r.q.PushAll(r.held[:n])
	r.held = r.held[:copy(r.held, r.held[n:])]
	c.rxPackets.Add(1)
	c.rxBytes.Add(uint64(len(packet) - HeaderSize))
	return true, nil
}
