package virtiovsock

// reply has the guest sent a packet without data; mu is held.
func (d *Device) reply(h header) {
	h.typ = typeStream
	h.srcCID, h.dstCID = HostCID, uint64(d.cid)
	d.replies = append(d.replies, h)
	signal(d.work)
}

// refuse answers a packet of the guest's that belongs to no connection; mu is
// held.
func (d *Device) refuse(h header) {
	if h.op != opReset {
		d.reply(header{srcPort: h.dstPort, dstPort: h.srcPort, op: opReset})
	}
}

// next puts the next packet for the guest into p, which has room for a header
// and some data, and returns its length; 0 if there is none.
func (d *Device) next(p []byte) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.replies) > 0 {
		h := d.replies[0]
		if d.replies = d.replies[1:]; len(d.replies) == 0 {
			d.replies = nil // and its memory
		}
		if c := d.conns[key{h.srcPort, h.dstPort}]; c != nil && h.op != opReset {
			h.bufAlloc, h.fwdCnt = c.credit()
		}
		h.put(p)
		signal(d.room)
		return headerSize
	}
	for len(d.sending) > 0 {
		c := d.sending[0]
		d.sending = d.sending[1:]
		c.listed = false
		n := min(len(c.out), c.allowed(), len(p)-headerSize)
		if n == 0 {
			continue // it was closed, or the credit taken back
		}
		h := header{
			srcCID: HostCID, dstCID: uint64(d.cid), srcPort: c.key.host, dstPort: c.key.guest,
			length: uint32(n), typ: typeStream, op: opData,
		}
		h.bufAlloc, h.fwdCnt = c.credit()
		h.put(p)
		copy(p[headerSize:], c.out[:n])
		c.out = c.out[n:]
		c.sent += uint32(n)
		d.stats.TxBytes += uint64(n)
		if len(c.out) == 0 {
			c.cond.Broadcast()
		}
		d.list(c)
		return headerSize + n
	}
	return 0
}

// list puts a connection in the queue of those that can send, behind the
// others; mu is held.
func (d *Device) list(c *Conn) {
	if !c.listed && len(c.out) > 0 && c.allowed() > 0 {
		c.listed = true
		d.sending = append(d.sending, c)
		signal(d.work)
	}
}

// packet takes a packet of the guest's. The header may say anything.
func (d *Device) packet(h header, data []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h.srcCID != uint64(d.cid) {
		d.stats.Invalid++ // nobody to answer to
		return
	}
	if h.dstCID != HostCID || h.typ != typeStream || uint64(h.length) != uint64(len(data)) || h.op < opRequest || h.op > opCreditRequest ||
		h.op != opData && len(data) > 0 {
		d.stats.Invalid++
		if h.dstCID == HostCID {
			if c := d.conns[key{h.dstPort, h.srcPort}]; c != nil && h.typ == typeStream {
				d.drop(c, ErrReset)
			}
			d.refuse(h)
		}
		return
	}
	c := d.conns[key{h.dstPort, h.srcPort}]
	switch {
	case c == nil && h.op == opRequest:
		d.request(h)
		return
	case c == nil:
		d.refuse(h)
		return
	case !c.update(h.bufAlloc, h.fwdCnt):
		d.wrong(c, "the guest has received more than it was sent")
		return
	}
	switch h.op {
	case opReset:
		if c.stage == dialing {
			d.drop(c, ErrRefused)
		} else {
			d.drop(c, ErrReset)
		}
	case opResponse:
		if c.stage != dialing {
			d.wrong(c, "an answer to a connection that is established")
			return
		}
		c.stage = established
		d.stats.Connections++
		c.cond.Broadcast()
	case opRequest:
		d.wrong(c, "a connection is asked for twice")
	case opData:
		d.data(c, data)
	case opShutdown:
		d.shutdown(c, h.flags)
	case opCreditRequest:
		d.reply(header{srcPort: c.key.host, dstPort: c.key.guest, op: opCreditUpdate})
	}
	d.list(c)
}

// data takes data of an established connection; mu is held.
func (d *Device) data(c *Conn, data []byte) {
	switch {
	case c.stage == dialing || c.stage == accepting || c.peerShut&shutSend != 0:
		d.wrong(c, "data on a connection that has none now")
	case c.stage == closing:
		// Nobody reads any more: lost, as with any socket.
		c.received += uint32(len(data))
		c.taken += uint32(len(data))
	case len(data) > bufferSize-int(c.received-c.taken):
		d.wrong(c, "the guest sends more than it has credit for")
	default:
		c.in = append(c.in, data...)
		c.received += uint32(len(data))
		d.stats.RxBytes += uint64(len(data))
		c.cond.Broadcast()
	}
}

// shutdown notes what the guest will not do any more; mu is held.
func (d *Device) shutdown(c *Conn, flags uint32) {
	c.peerShut |= flags & (shutReceive | shutSend)
	c.cond.Broadcast()
	if c.peerShut&shutReceive != 0 {
		c.out = nil
	}
	if c.peerShut == shutReceive|shutSend { // the answer to the last word
		d.reply(header{srcPort: c.key.host, dstPort: c.key.guest, op: opReset})
		delete(d.conns, c.key)
		c.gone = true
		if c.stage != established {
			c.end(ErrReset)
		}
	}
}

// drop ends a connection that the guest knows the end of; mu is held.
func (d *Device) drop(c *Conn, err error) {
	delete(d.conns, c.key)
	c.end(err)
}

// wrong ends a connection whose other end breaks the rules; mu is held.
func (d *Device) wrong(c *Conn, why string) {
	d.stats.Invalid++
	d.log.Warn("a socket connection of the guest is reset", "reason", why, "host_port", c.key.host, "guest_port", c.key.guest)
	d.reset(c, ErrReset)
}

// reset ends a connection and tells the guest; mu is held.
func (d *Device) reset(c *Conn, err error) {
	if !c.gone {
		d.reply(header{srcPort: c.key.host, dstPort: c.key.guest, op: opReset})
	}
	d.drop(c, err)
}

// request is a connection that the guest asks for; mu is held.
func (d *Device) request(h header) {
	l := d.listeners[h.dstPort]
	if len(d.conns) >= d.max || l == nil && d.connect == nil || l != nil && len(l.waiting) == cap(l.waiting) {
		d.stats.Refused++
		d.refuse(h)
		return
	}
	c := d.newConn(key{h.dstPort, h.srcPort}, accepting)
	c.update(h.bufAlloc, h.fwdCnt)
	if l != nil {
		d.accept(c)
		l.waiting <- c // has room: only we put something there
		return
	}
	d.wg.Go(func() { d.pass(c) })
}

// accept establishes a connection that the guest asked for; mu is held.
func (d *Device) accept(c *Conn) {
	c.stage = established
	d.stats.Connections++
	d.reply(header{srcPort: c.key.host, dstPort: c.key.guest, op: opResponse})
}
