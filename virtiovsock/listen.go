package virtiovsock

import (
	"fmt"
	"io"
	"net"
	"sync"
)

// Listener takes the guest's connections to a port, a net.Listener.
type Listener struct {
	d       *Device
	port    uint32
	waiting chan *Conn
	done    chan struct{}
	once    sync.Once
}

// Listen takes the connections that the guest makes to a port of this side's.
// It may be called before the guest runs.
func (d *Device) Listen(port uint32) (*Listener, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return nil, net.ErrClosed
	case d.listeners[port] != nil:
		return nil, fmt.Errorf("%w: %d", ErrPortInUse, port)
	}
	l := &Listener{d: d, port: port, waiting: make(chan *Conn, backlog), done: make(chan struct{})}
	d.listeners[port] = l
	return l, nil
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case <-l.done: // also if there is one: it was reset
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-l.waiting:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *Listener) end() { l.once.Do(func() { close(l.done) }) }

// Close implements net.Listener: connections that nobody accepted are reset.
func (l *Listener) Close() error {
	l.d.mu.Lock()
	defer l.d.mu.Unlock()
	if l.d.listeners[l.port] == l {
		delete(l.d.listeners, l.port)
	}
	l.end()
	for {
		select {
		case c := <-l.waiting:
			if c.err == nil && !c.gone {
				l.d.reset(c, net.ErrClosed)
			}
		default:
			return nil
		}
	}
}

// Addr implements net.Listener.
func (l *Listener) Addr() net.Addr { return Addr{HostCID, l.port} }

// pass connects a connection of the guest's to where Config.Connect says.
func (d *Device) pass(c *Conn) {
	to, err := d.connect(c.key.host)
	d.mu.Lock()
	switch {
	case err != nil:
		if c.err == nil {
			d.stats.Refused++
			d.reset(c, ErrRefused)
		}
		d.mu.Unlock()
		return
	case c.err != nil || c.gone || d.closed:
		d.mu.Unlock()
		to.Close()
		return
	}
	d.accept(c)
	d.mu.Unlock()
	Join(c, to)
}

// Join passes on what two connections say, until both have said all or one of
// them breaks off, and closes them.
func Join(a, b net.Conn) {
	var wg sync.WaitGroup
	one := func(to, from net.Conn) {
		_, err := io.Copy(struct{ io.Writer }{to}, struct{ io.Reader }{from})
		if w, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
			err = w.CloseWrite()
		}
		if err != nil {
			a.Close()
			b.Close()
		}
	}
	wg.Go(func() { one(a, b) })
	one(b, a)
	wg.Wait()
	a.Close()
	b.Close()
}
