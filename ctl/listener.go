package ctl

import (
	"net"
	"sync"

	"github.com/moovm/moovm/internal/unixsock"
)

// Listen makes a UNIX socket at path for a Server, to which only this user (and
// root) can connect. One that a killed process has left there is replaced.
func Listen(path string) (net.Listener, error) {
	l, err := unixsock.Listen(path)
	if err != nil {
		return nil, err
	}
	return unixsock.SameUser(l), nil
}

// limitListener accepts so many connections at a time. One too many hears of it
// by the end of its connection.
type limitListener struct {
	net.Listener
	slots chan struct{}
}

// Accept implements net.Listener.
func (l *limitListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		select {
		case l.slots <- struct{}{}:
			return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
		default:
			c.Close()
		}
	}
}

type limitedConn struct {
	net.Conn
	release func()
}

// Close implements net.Conn.
func (c *limitedConn) Close() error {
	err := c.Conn.Close()
	c.release()
	return err
}
