//go:build unix

package unixsock

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// ErrInUse says that another process listens on the socket.
var ErrInUse = errors.New("another process listens there already; choose another path")

// Listen listens on a new socket at path that only this user can connect to. A
// socket nobody listens on any more is replaced; anything else in the way is
// an error. The socket goes with the listener's Close.
func Listen(path string) (*net.UnixListener, error) {
	l, err := listen(path)
	if !errors.Is(err, syscall.EADDRINUSE) {
		return l, err
	}
	if st, serr := os.Lstat(path); serr != nil || st.Mode()&os.ModeSocket == 0 {
		return nil, err
	}
	switch c, derr := net.Dial("unix", path); {
	case derr == nil:
		c.Close()
		return nil, fmt.Errorf("socket %s: %w", path, ErrInUse)
	case !errors.Is(derr, syscall.ECONNREFUSED):
		return nil, fmt.Errorf("socket %s is there already: %w", path, derr)
	}
	if err := os.Remove(path); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return listen(path)
}

// maxPath is the longest name of a socket, in bytes (sun_path, less the zero at
// its end).
const maxPath = len(syscall.RawSockaddrUnix{}.Path) - 1

func listen(path string) (*net.UnixListener, error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("socket %s: its path has %d bytes, and a socket's can have %d; use a shorter or a relative one", path, len(path), maxPath)
	}
	// The mode of an unbound socket becomes that of its name (unix(7), on
	// Linux), so there is no moment at which others can connect.
	c := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		cerr := raw.Control(func(fd uintptr) { err = syscall.Fchmod(int(fd), 0o600) })
		return errors.Join(cerr, err)
	}}
	l, err := c.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return l.(*net.UnixListener), nil
}
