package agent

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/moovm/moovm/internal/bytejson"
)

// ErrGone says that the agent ended before a session did.
var ErrGone = errors.New("the agent is gone")

// A Client starts commands at an agent. Its methods may be called from any
// goroutine.
type Client struct {
	w       *Writer
	done    chan struct{}
	replies chan Frame // to Hold and Go

	mu       sync.Mutex
	sessions map[uint32]*Session
	next     uint32
	gone     error
}

// NewClient returns a client of the agent that is read from r and written to
// w. It works until r ends: the caller then knows by Done.
func NewClient(r io.Reader, w io.Writer) *Client {
	c := newClient(w)
	go c.serve(r)
	return c
}

func newClient(w io.Writer) *Client {
	return &Client{w: NewWriter(w), sessions: map[uint32]*Session{}, done: make(chan struct{}), replies: make(chan Frame, 2)}
}

// Done is closed when the stream from the agent has ended.
func (c *Client) Done() <-chan struct{} { return c.done }

func (c *Client) serve(r io.Reader) {
	defer close(c.done)
	var err error
	for {
		var f Frame
		if f, err = ReadFrame(r); err != nil {
			break
		}
		if f.Kind == KindHeld || f.Kind == KindGone {
			select {
			case c.replies <- f:
			default: // nobody asked
			}
			continue
		}
		c.mu.Lock()
		s := c.sessions[f.ID]
		if f.Kind == KindExit {
			delete(c.sessions, f.ID)
		}
		c.mu.Unlock()
		if s != nil { // else it has been killed meanwhile
			s.handle(f)
		}
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) {
		err = ErrGone
	} else {
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	c.mu.Lock()
	c.gone = err
	left := c.sessions
	c.sessions = nil
	c.mu.Unlock()
	for _, s := range left {
		s.end(Exit{}, err)
	}
}

// A Session is one running command.
type Session struct {
	c     *Client
	id    uint32
	stdin *budget
	done  chan struct{}

	output *queue // not delivered yet

	once sync.Once
	exit Exit
	err  error
}

// Start starts a command. What it writes goes to stdout and stderr (nil
// discards), in order, from a goroutine of the session; stdin is read until it
// ends (nil = at once), and a Read that blocks is abandoned when the command
// ends.
func (c *Client) Start(cmd Command, stdin io.Reader, stdout, stderr io.Writer) (*Session, error) {
	b, err := bytejson.Marshal(cmd)
	if err != nil {
		return nil, err
	}
	if len(b) > MaxPayload {
		return nil, fmt.Errorf("agent: the command with its environment has %d bytes; %d is the limit", len(b), MaxPayload)
	}
	s := &Session{c: c, stdin: newBudget(), output: newQueue(), done: make(chan struct{})}
	c.mu.Lock()
	if c.gone != nil {
		defer c.mu.Unlock()
		return nil, c.gone
	}
	c.next++
	s.id = c.next
	c.sessions[s.id] = s
	c.mu.Unlock()
	if err := c.w.Write(Frame{s.id, KindStart, b}); err != nil {
		c.forget(s)
		return nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	go s.deliver(stdout, stderr)
	go func() {
		if stdin != nil {
			_ = s.stdin.send(c.w, s.id, KindStdin, stdin)
		}
		_ = c.w.Write(Frame{ID: s.id, Kind: KindStdinEOF})
	}()
	return s, nil
}

func (c *Client) forget(s *Session) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.sessions, s.id)
}

func (s *Session) handle(f Frame) {
	switch f.Kind {
	case KindStdout, KindStderr:
		if !s.output.put(f) {
			s.c.forget(s)
			s.end(Exit{}, fmt.Errorf("%w: more output than was granted", ErrFrame))
		}
	case KindCredit:
		s.stdin.add(creditOf(f))
	case KindExit:
		var e Exit
		if err := bytejson.Unmarshal(f.Payload, &e); err != nil {
			s.end(Exit{}, fmt.Errorf("%w: %w", ErrFrame, err))
			return
		}
		e.Status &= 0xff
		s.end(e, nil)
	}
}

func (s *Session) end(e Exit, err error) {
	s.once.Do(func() { s.exit, s.err = e, err })
	s.stdin.close()
	s.output.close()
}

// deliver passes the output on and grants more.
func (s *Session) deliver(stdout, stderr io.Writer) {
	defer close(s.done)
	for {
		f, ok := s.output.take()
		if !ok {
			return
		}
		w := stdout
		if f.Kind == KindStderr {
			w = stderr
		}
		if w != nil {
			_, _ = w.Write(f.Payload) // a reader that is gone does not end the command
		}
		_ = s.c.w.credit(s.id, len(f.Payload))
	}
}

// Signal sends a signal, by its Linux number, to the command's process group.
func (s *Session) Signal(number int) error {
	return s.c.w.Write(Frame{s.id, KindSignal, []byte{byte(number)}})
}

// Kill ends the command with its process group; Wait says so.
func (s *Session) Kill() { _ = s.c.w.Write(Frame{ID: s.id, Kind: KindKill}) }

// Done is closed when Wait would not block.
func (s *Session) Done() <-chan struct{} { return s.done }

// Wait waits until the command has ended and its output is delivered. The
// error says that the agent failed; it matches ErrGone.
func (s *Session) Wait() (Exit, error) {
	<-s.done
	return s.exit, s.err
}
