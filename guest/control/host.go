package control

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/moovm/moovm/internal/bytejson"
)

// Hello introduces the init.
type Hello struct {
	Version int    `json:"version"`
	Release string `json:"release"` // uname -r
}

// HostConfig is what the host does with the streams of the command.
type HostConfig struct {
	// Stdin is sent to the command; nil = it reads end of file at once. A Read
	// that blocks is abandoned, not interrupted, when the line ends.
	Stdin io.Reader
	// Stdout and Stderr take the command's output; nil discards it. A slow
	// writer slows the command down.
	Stdout, Stderr io.Writer
	// OnStart is called when the command, or the disk's init, is about to
	// start; may be nil.
	OnStart func(what string)
	// OnWarning is called with what the init found missing; may be nil.
	OnWarning func(text string)
	// OnBye is called when the guest is about to switch off; may be nil.
	OnBye func()
}

// State is what is known of a guest from its control line.
type State struct {
	// Hello says that the init introduced itself: the kernel reached user space.
	Hello bool
	// Release is the running kernel's, as the guest says.
	Release string
	// Started says that the command or the disk's init was started.
	Started bool
	// Exited says that the command ended, with Status (0 to 255), or killed by
	// Signal if that is not 0; Status is then 128 + Signal.
	Exited bool
	Status int
	Signal int
	// Bye says that the init finished all it had to do: file systems are clean.
	Bye bool
	// Failure is what the init reported instead of running the command.
	Failure *GuestError
	// Garbage counts bytes that belonged to no frame.
	Garbage int64
}

// Host is the host's end of the control line: the stdin, stdout, stderr,
// exit status, window size and signals of the guest's command, in frames on a
// serial port (ttyS1 of the guest) or another byte stream. There may be several
// of these, the best added last; the best one that the guest says hello on is
// used. The guest is not trusted: frames are
// bounded, and nonsense costs an error at most. Methods may be called from any
// goroutine.
type Host struct {
	cfg   HostConfig
	lines []controlLine

	wmu sync.Mutex // one frame at a time on w
	w   io.Writer  // of the line in use
	use int        // its index, changed with mu held, too; an earlier line's hello may arrive late

	hmu sync.Mutex // one frame at a time is handled

	mu     sync.Mutex
	state  State
	credit int
	window int        // the first credit: what is granted again and again
	wake   *sync.Cond // credit or done changed
	done   bool
	stdin  bool // the goroutine that sends stdin was started
}

type controlLine struct {
	r io.Reader
	w io.Writer
}

// NewHost returns the host's end of a line that is read from r and written
// to w. Nothing happens before Run.
func NewHost(r io.Reader, w io.Writer, cfg HostConfig) *Host {
	c := &Host{cfg: cfg, lines: []controlLine{{r, w}}, w: w}
	c.wake = sync.NewCond(&c.mu)
	return c
}

// AddLine gives the guest another line to choose. It must come before Run.
func (c *Host) AddLine(r io.Reader, w io.Writer) {
	c.lines = append(c.lines, controlLine{r, w})
}

// State returns what is known now.
func (c *Host) State() State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// Run serves the line until it ends (nil), reading fails, too much of what
// arrives is no frame (ErrLine), or the command's output cannot be written.
// It does not end with the command: end the reader when the machine has
// stopped. With several lines, it ends when all have.
func (c *Host) Run() error {
	errs := make([]error, len(c.lines))
	var all sync.WaitGroup
	for i, l := range c.lines {
		all.Go(func() { errs[i] = c.serve(i, l.r) })
	}
	all.Wait()
	c.mu.Lock()
	c.done = true
	c.wake.Broadcast()
	c.mu.Unlock()
	return errors.Join(errs...)
}

func (c *Host) serve(line int, r io.Reader) error {
	frames := NewFrameReader(r)
	var outErr error
	garbage := int64(0)
	for {
		f, err := frames.Next()
		if more := frames.garbage - garbage; more > 0 {
			garbage = frames.garbage
			c.set(func(s *State) { s.Garbage += more })
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe) {
			return outErr
		}
		if err != nil {
			return err
		}
		// An output that is gone does not end the line: the status still counts.
		c.hmu.Lock()
		err = c.handle(f, line)
		c.hmu.Unlock()
		if err != nil && outErr == nil {
			outErr = err
		}
	}
}

func (c *Host) handle(f Frame, line int) error {
	switch f.Kind {
	case FrameStdout:
		return output(c.cfg.Stdout, f.Payload, "stdout")
	case FrameStderr:
		return output(c.cfg.Stderr, f.Payload, "stderr")
	case FrameStart:
		c.set(func(s *State) { s.Started = true })
		if c.cfg.OnStart != nil {
			c.cfg.OnStart(text(string(f.Payload)))
		}
	case FrameWarn:
		if c.cfg.OnWarning != nil {
			c.cfg.OnWarning(text(string(f.Payload)))
		}
	case FrameHello:
		c.wmu.Lock()
		if line >= c.use {
			c.w = c.lines[line].w
			c.set(func(*State) { c.use = line })
		}
		c.wmu.Unlock()
		var h Hello
		_ = bytejson.Unmarshal(f.Payload, &h) // a hello is a hello
		c.set(func(s *State) { s.Hello, s.Release = true, text(h.Release) })
	case FrameExit:
		if len(f.Payload) == 8 {
			status, signal := binary.LittleEndian.Uint32(f.Payload), binary.LittleEndian.Uint32(f.Payload[4:])
			c.set(func(s *State) {
				s.Exited, s.Status, s.Signal = true, int(status&0xff), int(signal&0x7f)
				if s.Signal != 0 {
					s.Status = 128 + s.Signal
				}
			})
		}
	case FrameError:
		var e GuestError
		if err := bytejson.Unmarshal(f.Payload, &e); err != nil {
			e = GuestError{Kind: FailInternal, Message: string(f.Payload)}
		}
		e.Message, e.Kind, e.Status = text(e.Message), text(e.Kind), e.Status&0xff
		c.set(func(s *State) {
			if s.Failure == nil {
				s.Failure = &e
			}
		})
	case FrameBye:
		c.set(func(s *State) { s.Bye = true })
		if c.cfg.OnBye != nil {
			c.cfg.OnBye()
		}
	case FrameCredit:
		if len(f.Payload) == 4 {
			c.grant(binary.LittleEndian.Uint32(f.Payload))
		}
	}
	return nil
}

func (c *Host) set(f func(*State)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.state)
}

// grant allows more stdin. A guest cannot make the host buffer anything: what
// is granted is only ever read and sent.
func (c *Host) grant(n uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.credit = int(min(int64(c.credit)+int64(n), MaxCredit))
	if c.window == 0 {
		c.window = c.credit
	}
	if !c.stdin {
		c.stdin = true
		go c.sendStdin()
	}
	c.wake.Broadcast()
}

// Saved is a line at rest, as plain data: what a copy of its guest knows.
type Saved struct {
	// Line is the one in use, by the order of AddLine.
	Line   int
	Credit int
	State  State
}

// Idle waits until the guest has taken all of the command's stdin that was
// sent, and given the credit back, and returns the line as it is then. It stays
// so only while Stdin has nothing more.
func (c *Host) Idle(ctx context.Context) (Saved, error) {
	defer context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.wake.Broadcast()
	})()
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.window == 0 || c.credit < c.window {
		if c.done {
			return Saved{}, errors.New("control line: it has ended")
		}
		if ctx.Err() != nil {
			return Saved{}, context.Cause(ctx)
		}
		c.wake.Wait()
	}
	return Saved{Line: c.use, Credit: c.credit, State: c.state}, nil
}

// Continue makes the host that of a copy of a guest, whose line was saved. It
// must come after AddLine and before Run. What makes no sense is ErrLine.
func (c *Host) Continue(s Saved) error {
	if s.Line < 0 || s.Line >= len(c.lines) || s.Credit < 0 || s.Credit > MaxCredit {
		return fmt.Errorf("%w: line %d, credit %d", ErrLine, s.Line, s.Credit)
	}
	c.use, c.w = s.Line, c.lines[s.Line].w
	c.state = s.State
	if s.Credit > 0 {
		c.grant(uint32(s.Credit))
	}
	return nil
}

// sendStdin starts with the first credit, so that nothing is taken from the
// host's stdin for a guest that never gets to its command.
func (c *Host) sendStdin() {
	buf := make([]byte, MaxFrame)
	for c.cfg.Stdin != nil {
		c.mu.Lock()
		for c.credit == 0 && !c.done {
			c.wake.Wait()
		}
		n := min(c.credit, len(buf))
		done := c.done
		c.mu.Unlock()
		if done {
			return
		}
		n, err := c.cfg.Stdin.Read(buf[:n])
		if n > 0 {
			c.mu.Lock()
			c.credit -= n
			c.mu.Unlock()
			if c.send(FrameStdin, buf[:n]) != nil {
				return
			}
		}
		if err != nil {
			break
		}
	}
	_ = c.send(FrameStdinEOF, nil)
}

// send writes one frame.
func (c *Host) send(kind FrameKind, payload []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	_, err := c.w.Write(AppendFrame(nil, kind, payload))
	return err
}

// Resize tells the guest the size of the terminal, in characters.
func (c *Host) Resize(rows, columns uint16) error {
	var b []byte
	b = binary.LittleEndian.AppendUint16(b, rows)
	b = binary.LittleEndian.AppendUint16(b, columns)
	return c.send(FrameResize, b)
}

// Signal sends a signal, by its Linux number, to the command (its process
// group). Number 0 sends none, as with kill(2): it only reaches the guest.
func (c *Host) Signal(number int) error {
	if number < 0 || number > 64 {
		return fmt.Errorf("control line: %d is not a signal", number)
	}
	return c.send(FrameSignal, []byte{byte(number)})
}

func output(w io.Writer, p []byte, name string) error {
	if w == nil || len(p) == 0 {
		return nil
	}
	if _, err := w.Write(p); err != nil {
		return fmt.Errorf("the command's %s cannot be written: %w", name, err)
	}
	return nil
}
