package unixsock

import (
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// SameUser returns l with the connections of other users than this one and root
// closed instead of accepted (SO_PEERCRED, unix(7)): the socket's mode keeps
// them out already, but a mode can be changed.
func SameUser(l *net.UnixListener) net.Listener { return sameUser{l, os.Geteuid()} }

type sameUser struct {
	*net.UnixListener
	uid int
}

// Accept implements net.Listener.
func (l sameUser) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if uid, err := peer(c); err == nil && (uid == l.uid || uid == 0) {
			return c, nil
		}
		c.Close()
	}
}

// peer is who connected.
func peer(c *net.UnixConn) (uid int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, err
	}
	return int(cred.Uid), nil
}
