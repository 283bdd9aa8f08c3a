package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/moovm/moovm/internal/ratelog"
	"github.com/moovm/moovm/internal/unixsock"
	"github.com/moovm/moovm/virtio"
)

// Options are the choices a server has; the zero value is good for most.
type Options struct {
	// CloseWait bounds how long the end of a connection waits for requests
	// in flight; 0 means 5 seconds.
	CloseWait time.Duration
	// Logger receives the reasons for which connections end; nil discards
	// them.
	Logger *slog.Logger
}

func (o *Options) fill() {
	if o.CloseWait == 0 {
		o.CloseWait = 5 * time.Second
	}
	o.Logger = ratelog.New(o.Logger)
}

// Listen listens on a UNIX socket at path that only this user can connect to. A
// socket nobody listens on any more, left by a process that was killed, is
// replaced.
func Listen(path string) (*net.UnixListener, error) {
	l, err := unixsock.Listen(path)
	if err != nil {
		return nil, fmt.Errorf("vhost-user: %w", err)
	}
	return l, nil
}

// Serve accepts connections on l and serves dev to them, one after the other,
// until ctx ends, which is no error. It closes l. When requests in flight do
// not end with their connection it returns: dev can serve nobody else.
func Serve(ctx context.Context, l *net.UnixListener, dev virtio.Device, o Options) error {
	o.fill()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("vhost-user: %w", err)
		}
		err = ServeConn(ctx, c, dev, o)
		switch {
		case errors.Is(err, ErrStuck):
			return err
		case err != nil:
			o.Logger.Warn("vhost-user: connection closed", "error", err)
		}
	}
}

// ErrStuck says that requests in flight did not end when their connection did.
// The device cannot be used again, and the guest memory stays mapped.
var ErrStuck = errors.New("vhost-user: requests in flight do not end")

// ErrProtocol says that the front-end sent what makes no sense; what it was is
// in the message.
var ErrProtocol = errors.New("vhost-user: protocol error")

// ServeConn serves dev to one front-end and closes the connection. It returns
// nil when the front-end hangs up or ctx ends.
func ServeConn(ctx context.Context, c *net.UnixConn, dev virtio.Device, o Options) error {
	o.fill()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	s := newSession(ctx, c, dev, o)
	err := s.serve()
	if ctx.Err() != nil {
		err = nil
	}
	wait, cancel := context.WithTimeout(context.Background(), o.CloseWait)
	defer cancel()
	if cerr := s.close(wait); cerr != nil {
		return errors.Join(cerr, err)
	}
	return err
}
