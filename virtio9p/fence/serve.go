package fence

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"

	"github.com/moovm/moovm/internal/ratelog"
)

// maxPending bounds the messages of one connection that are under way, as the
// queue of 128 descriptors bounds those of a guest.
const maxPending = 128

// Serve serves the file tree of cfg to every connection l accepts, until ctx
// is done or l fails. It owns l: when Serve returns, l and every connection
// are closed and every session has ended. The error is nil after ctx is done.
func Serve(ctx context.Context, l net.Listener, cfg Config) error {
	cfg.Logger = ratelog.New(cfg.Logger) // one limit for all connections
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				continue
			}
			return err
		}
		wg.Go(func() { ServeConn(ctx, conn, cfg) })
	}
}

// ServeConn serves the file tree of cfg to one client over a byte stream. It
// owns conn and returns, with conn closed and the session ended, when the
// client hangs up or ctx is done (nil), or when the stream makes no sense.
func ServeConn(ctx context.Context, conn io.ReadWriteCloser, cfg Config) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	cfg = cfg.withDefaults()
	s := NewSession(cfg)
	defer s.Close()
	// A client that does not read its replies must not keep Close waiting.
	defer conn.Close()

	c := &stream{conn: conn, slots: make(chan struct{}, maxPending)}
	for {
		var hdr [headerLen]byte
		if _, err := io.ReadFull(conn, hdr[:]); err != nil {
			if err == io.EOF || ctx.Err() != nil {
				return nil
			}
			return err
		}
		// Of a message that cannot be, the end cannot be known either.
		size := binary.LittleEndian.Uint32(hdr[:])
		if size < headerLen || size > cfg.MaxMsize {
			return errors.New("9P client: a message of an impossible length")
		}
		msg := make([]byte, size)
		copy(msg, hdr[:])
		if _, err := io.ReadFull(conn, msg[headerLen:]); err != nil {
			return err
		}
		c.slots <- struct{}{}
		s.Submit(&streamExchange{c: c, msg: msg}, len(msg), int(s.Msize()))
	}
}

// stream is the reply side of a connection.
type stream struct {
	mu    sync.Mutex // one reply at a time
	conn  io.Writer
	slots chan struct{}
}

// streamExchange collects a reply and sends it when it is whole.
type streamExchange struct {
	c     *stream
	msg   []byte // what is left of the T-message
	reply []byte
}

func (x *streamExchange) Read(p []byte) (int, error) {
	if len(x.msg) == 0 {
		return 0, io.EOF
	}
	n := copy(p, x.msg)
	x.msg = x.msg[n:]
	return n, nil
}

func (x *streamExchange) Write(p []byte) (int, error) {
	if x.reply == nil && len(p) >= 4 { // the first piece is the header
		x.reply = make([]byte, 0, max(len(p), int(binary.LittleEndian.Uint32(p))))
	}
	x.reply = append(x.reply, p...)
	return len(p), nil
}

func (x *streamExchange) Done() {
	if len(x.reply) > 0 {
		x.c.mu.Lock()
		x.c.conn.Write(x.reply) // the reading side finds out about errors
		x.c.mu.Unlock()
	}
	<-x.c.slots
}
