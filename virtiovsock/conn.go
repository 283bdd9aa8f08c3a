package virtiovsock

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// bufferSize is what the guest may send on a connection before it is read.
	bufferSize = 128 << 10
	// firstPort is where the ports begin that Dial comes from.
	firstPort = 1 << 30
	// closeLimit is how long a guest may take to confirm that a connection was
	// closed, as Linux gives it.
	closeLimit = 8 * time.Second
	// backlog is how many connections wait for Accept.
	backlog = 128
)

// stage is how far a connection has come.
type stage int

const (
	dialing     stage = iota // the guest has been asked
	accepting                // the guest has asked
	established              // until either end closes it
	closing                  // closed here, the guest does not know
)

// Conn is a connection to the guest, a net.Conn with CloseWrite. That a Write
// succeeds does not say that somebody in the guest has read it.
type Conn struct {
	d    *Device
	key  key
	cond *sync.Cond // on d.mu, of all that follows

	stage    stage
	err      error  // why it has ended; nil while it has not
	gone     bool   // the guest has forgotten it
	in       []byte // from the guest, not read yet
	out      []byte // of a Write, not sent yet
	writing  bool
	listed   bool // in Device.sending
	shut     uint32
	peerShut uint32
	timer    *time.Timer // of closing

	received, taken, told  uint32 // bytes from the guest, those read, and those the guest knows to be read
	sent, peerAlloc, peerN uint32 // bytes to the guest, its buffer, and what it has read

	readLimit, writeLimit limit
}

// limit is a deadline.
type limit struct {
	at    time.Time
	timer *time.Timer
}

func (l *limit) passed() bool { return !l.at.IsZero() && !time.Now().Before(l.at) }

// newConn adds a connection; mu is held.
func (d *Device) newConn(k key, s stage) *Conn {
	c := &Conn{d: d, key: k, cond: sync.NewCond(&d.mu), stage: s}
	d.conns[k] = c
	return c
}

// Dial connects to a port of the guest's. Errors are ErrNotReady, ErrRefused,
// ErrTooMany, or ctx's.
func (d *Device) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, net.ErrClosed
	case !d.running:
		return nil, ErrNotReady
	case len(d.conns) >= d.max:
		return nil, fmt.Errorf("%w: %d", ErrTooMany, d.max)
	}
	k := key{d.nextPort, port}
	for d.conns[k] != nil || d.listeners[k.host] != nil {
		k.host++
		k.host = max(k.host, firstPort)
	}
	d.nextPort = max(k.host+1, firstPort)
	c := d.newConn(k, dialing)
	d.reply(header{srcPort: k.host, dstPort: port, op: opRequest})
	stop := context.AfterFunc(ctx, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		c.cond.Broadcast()
	})
	defer stop()
	for c.stage == dialing && c.err == nil && ctx.Err() == nil {
		c.cond.Wait()
	}
	switch {
	case c.err != nil:
		return nil, c.err
	case c.stage == dialing:
		d.reset(c, context.Cause(ctx))
		return nil, c.err
	}
	return c, nil
}

// end ends the connection on this side; mu is held.
func (c *Conn) end(err error) {
	if c.err == nil {
		c.err = err
	}
	c.gone = true
	c.out = nil
	if c.timer != nil {
		c.timer.Stop()
	}
	c.cond.Broadcast()
}

// credit is what the guest is told about the buffer; mu is held.
func (c *Conn) credit() (alloc, taken uint32) {
	c.told = c.taken
	return bufferSize, c.taken
}

// update notes what the guest says about its buffer; false if it claims to have
// read what it was never sent. Linux' packets may overtake each other, so that
// an older count comes later. mu is held.
func (c *Conn) update(alloc, n uint32) bool {
	if int32(c.sent-n) < 0 {
		return false
	}
	c.peerAlloc = alloc
	if int32(n-c.peerN) > 0 {
		c.peerN = n
	}
	return true
}

// allowed is how much the guest has room for; mu is held.
func (c *Conn) allowed() int {
	if c.stage != established || c.gone || c.err != nil {
		return 0
	}
	return max(0, int(c.peerAlloc)-int(c.sent-c.peerN))
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	for {
		switch {
		case c.stage == closing:
			return 0, c.fail("read", net.ErrClosed)
		case c.readLimit.passed():
			return 0, c.fail("read", os.ErrDeadlineExceeded)
		case len(p) == 0:
			return 0, nil
		case len(c.in) > 0:
			n := copy(p, c.in)
			if c.in = c.in[n:]; len(c.in) == 0 {
				c.in = nil
			}
			c.taken += uint32(n)
			if !c.gone && c.taken-c.told >= bufferSize/4 {
				c.told = c.taken
				c.d.reply(header{srcPort: c.key.host, dstPort: c.key.guest, op: opCreditUpdate})
			}
			return n, nil
		case c.peerShut&shutSend != 0:
			return 0, io.EOF
		case c.err != nil:
			return 0, c.fail("read", c.err)
		}
		c.cond.Wait()
	}
}

// Write implements net.Conn: it returns when the guest's driver has p.
func (c *Conn) Write(p []byte) (n int, err error) {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	for c.writing { // one after the other
		c.cond.Wait()
	}
	c.writing, c.out = true, p
	c.d.list(c)
	defer func() {
		c.writing, c.out = false, nil
		c.cond.Broadcast()
	}()
	for {
		switch {
		case c.stage == closing:
			err = net.ErrClosed
		case c.err != nil:
			err = c.err
		case c.shut&shutSend != 0:
			err = net.ErrClosed
		case c.peerShut&shutReceive != 0:
			err = ErrReset
		case len(c.out) == 0:
			return len(p), nil
		case c.writeLimit.passed():
			err = os.ErrDeadlineExceeded
		}
		if err != nil {
			return len(p) - len(c.rest(p)), c.fail("write", err)
		}
		c.cond.Wait()
	}
}

// rest is what was not sent of p; mu is held. An ended connection does not know
// any more.
func (c *Conn) rest(p []byte) []byte {
	if c.out == nil {
		return p
	}
	return c.out
}

func (c *Conn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "vsock", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// CloseWrite tells the guest that nothing more comes; reading goes on.
func (c *Conn) CloseWrite() error {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	switch {
	case c.err != nil:
		return c.fail("close", c.err)
	case c.stage == closing:
		return c.fail("close", net.ErrClosed)
	}
	c.tell(shutSend)
	return nil
}

// tell tells the guest what will not be done any more; mu is held.
func (c *Conn) tell(flags uint32) {
	if c.gone || c.shut|flags == c.shut {
		return
	}
	c.shut |= flags
	c.d.reply(header{srcPort: c.key.host, dstPort: c.key.guest, op: opShutdown, flags: c.shut})
	c.cond.Broadcast()
}

// Close implements net.Conn. The guest's answer is not waited for.
func (c *Conn) Close() error {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	if c.stage == closing {
		return c.fail("close", net.ErrClosed)
	}
	was := c.stage
	c.stage = closing
	c.in = nil
	for _, l := range []*limit{&c.readLimit, &c.writeLimit} {
		if l.timer != nil {
			l.timer.Stop()
		}
	}
	c.cond.Broadcast()
	switch {
	case c.gone:
	case was != established:
		c.d.reset(c, net.ErrClosed)
	default:
		c.taken = c.received
		c.tell(shutReceive | shutSend)
		c.timer = time.AfterFunc(c.d.confirm, func() {
			c.d.mu.Lock()
			defer c.d.mu.Unlock()
			if !c.gone {
				c.d.reset(c, net.ErrClosed)
			}
		})
	}
	return nil
}

// LocalAddr implements net.Conn.
func (c *Conn) LocalAddr() net.Addr { return Addr{HostCID, c.key.host} }

// RemoteAddr implements net.Conn.
func (c *Conn) RemoteAddr() net.Addr { return Addr{c.d.cid, c.key.guest} }

// SetDeadline implements net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setLimit(&c.readLimit, t) }

// SetWriteDeadline implements net.Conn.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setLimit(&c.writeLimit, t) }

func (c *Conn) setLimit(l *limit, t time.Time) error {
	c.d.mu.Lock()
	defer c.d.mu.Unlock()
	if c.stage == closing {
		return c.fail("set", net.ErrClosed)
	}
	if l.timer != nil {
		l.timer.Stop()
		l.timer = nil
	}
	l.at = t
	if !t.IsZero() {
		l.timer = time.AfterFunc(time.Until(t), func() {
			c.d.mu.Lock()
			defer c.d.mu.Unlock()
			c.cond.Broadcast()
		})
	}
	c.cond.Broadcast()
	return nil
}
