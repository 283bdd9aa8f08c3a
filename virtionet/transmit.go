package virtionet

import "github.com/moovm/moovm/virtio"

// serveTransmit serves the transmit queue of pair i (section 5.1.6.2).
func (d *Device) serveTransmit(i int, q *virtio.Queue) error {
	for {
		c, err := q.Next()
		if err != nil {
			return err
		}
		if c == nil {
			q.Notify()
			if !q.Wait() {
				return nil
			}
			continue
		}
		d.transmit(i, c.Reader())
		q.Push(c)
	}
}

// transmit sends one packet of the guest.
func (d *Device) transmit(i int, r *virtio.ChainReader) {
	p := d.pairs[i]
	c := &p.counters
	if n := r.Len(); n < HeaderSize+ethHeader || n > len(p.out) {
		c.txInvalid.Add(1)
		return
	}
	n, _ := r.Read(p.out)
	packet := p.out[:n]
	features := d.features.Load()
	o := Offloads{Checksum: features&FeatureCsum != 0}
	switch packet[hdrGSOType] {
	case gsoTCPv4:
		o.Segmentation = features&FeatureHostTSO4 != 0
	case gsoTCPv6:
		o.Segmentation = features&FeatureHostTSO6 != 0
	}
	h, ok := checkHeader(packet, o, d.mtu)
	switch {
	case !ok:
		c.txInvalid.Add(1)
		return
	case !d.up.Load():
		c.txDown.Add(1)
		return
	}
	copy(packet, h[:])
	if d.active.Load() > 1 { // what answers this flow comes in on this pair
		if slot := &d.flows[flow(packet[HeaderSize:])%flowSlots]; slot.Load() != uint32(i) {
			slot.Store(uint32(i))
		}
	}
	c.txPackets.Add(1)
	c.txBytes.Add(uint64(n - HeaderSize))
	d.link.Send(packet)
}
