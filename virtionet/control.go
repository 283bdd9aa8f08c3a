package virtionet

import "github.com/moovm/moovm/virtio"

// serveControl serves the control queue (section 5.1.6.5).
func (d *Device) serveControl(q *virtio.Queue) error {
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
		d.command(c)
		q.Push(c)
	}
}

// command executes one command. One that has no room for the answer is not
// executed.
func (d *Device) command(c *virtio.DescriptorChain) {
	ack, err := c.Writer().SplitLast(1)
	if err != nil || c.Writer().Len() > 0 {
		return
	}
	var b [16]byte // longer than any command there is
	n, _ := c.Reader().Read(b[:])
	answer := []byte{ctrlErr}
	if c.Reader().Len() == 0 && n >= 2 && d.execute(b[0], b[1], b[2:n]) {
		answer[0] = ctrlOK
	}
	ack.Write(answer)
}

func (d *Device) execute(class, cmd byte, data []byte) bool {
	features := d.features.Load()
	switch {
	case class == ctrlMAC && cmd == ctrlMACAddrSet && features&FeatureCtrlMACAddr != 0:
		if len(data) != 6 || !unicast(data) {
			return false
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		copy(d.mac[:], data)
		return true
	case class == ctrlMQ && cmd == ctrlMQPairsSet && features&FeatureMQ != 0:
		if len(data) != 2 {
			return false
		}
		n := int(le.Uint16(data))
		if n < 1 || n > len(d.pairs) {
			return false
		}
		d.active.Store(int32(n))
		return true
	case class == ctrlAnnounce && cmd == ctrlAnnounceAck && features&FeatureGuestAnnounce != 0:
		d.mu.Lock()
		defer d.mu.Unlock()
		d.announce = false
		return len(data) == 0
	}
	return false
}
