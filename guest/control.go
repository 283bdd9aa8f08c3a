package guest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"unicode/utf8"
)

// The kinds of a GuestError.
const (
	// FailConfig: the init cannot read its configuration.
	FailConfig = "config"
	// FailModule: a kernel module cannot be loaded.
	FailModule = "module"
	// FailRoot: the root device does not appear or cannot be mounted.
	FailRoot = "root"
	// FailMount: another file system cannot be mounted.
	FailMount = "mount"
	// FailInit: the disk has no init that can be started.
	FailInit = "init"
	// FailSetup: a line of the set-up that comes before the command failed.
	FailSetup = "setup"
	// FailCommand: the command cannot be started.
	FailCommand = "command"
	// FailInternal: the init itself is at fault.
	FailInternal = "internal"
)

// A GuestError is a failure that the init of the guest reported: the command
// did not run.
type GuestError struct {
	Kind    string `json:"kind"`    // one of the Fail constants
	Message string `json:"message"` // one sentence, made printable
	// Status is the exit status that shells give to a command that cannot be
	// started: 127 not found, 126 not executable; 0 for other kinds.
	Status int `json:"status,omitempty"`
}

func (e *GuestError) Error() string { return e.Message }

// helloFrame introduces the init.
type helloFrame struct {
	Version int    `json:"version"`
	Release string `json:"release"` // uname -r
}

// ControlConfig is what the host does with the streams of the command.
type ControlConfig struct {
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
}

// ControlState is what is known of a guest from its control line.
type ControlState struct {
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

// Control is the host's end of the control line: the stdin, stdout, stderr,
// exit status, window size and signals of the guest's command, in frames on a
// serial port (ttyS1 of the guest) or another byte stream. There may be several
// of these, the best added last; the best one that the guest says hello on is
// used. The guest is not trusted: frames are
// bounded, and nonsense costs an error at most. Methods may be called from any
// goroutine.
type Control struct {
	cfg   ControlConfig
	lines []controlLine

	wmu sync.Mutex // one frame at a time on w
	w   io.Writer  // of the line in use
	use int        // its index; an earlier line's hello may arrive late

	hmu   sync.Mutex // one frame at a time is handled
	onBye func()     // called when the guest is about to switch off; may be nil

	mu     sync.Mutex
	state  ControlState
	credit int
	wake   *sync.Cond // credit or done changed
	done   bool
	stdin  bool // the goroutine that sends stdin was started
}

type controlLine struct {
	r io.Reader
	w io.Writer
}

// NewControl returns the host's end of a line that is read from r and written
// to w. Nothing happens before Run.
func NewControl(r io.Reader, w io.Writer, cfg ControlConfig) *Control {
	c := &Control{cfg: cfg, lines: []controlLine{{r, w}}, w: w}
	c.wake = sync.NewCond(&c.mu)
	return c
}

// AddLine gives the guest another line to choose. It must come before Run.
func (c *Control) AddLine(r io.Reader, w io.Writer) {
	c.lines = append(c.lines, controlLine{r, w})
}

// State returns what is known now.
func (c *Control) State() ControlState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

// Run serves the line until it ends (nil), reading fails, too much of what
// arrives is no frame (ErrControl), or the command's output cannot be written.
// It does not end with the command: end the reader when the machine has
// stopped. With several lines, it ends when all have.
func (c *Control) Run() error {
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

func (c *Control) serve(line int, r io.Reader) error {
	frames := newFrameReader(r)
	var outErr error
	garbage := int64(0)
	for {
		f, err := frames.next()
		if more := frames.garbage - garbage; more > 0 {
			garbage = frames.garbage
			c.set(func(s *ControlState) { s.Garbage += more })
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

func (c *Control) handle(f frame, line int) error {
	switch f.kind {
	case frameStdout:
		return output(c.cfg.Stdout, f.payload, "stdout")
	case frameStderr:
		return output(c.cfg.Stderr, f.payload, "stderr")
	case frameStart:
		c.set(func(s *ControlState) { s.Started = true })
		if c.cfg.OnStart != nil {
			c.cfg.OnStart(printable(string(f.payload)))
		}
	case frameWarn:
		if c.cfg.OnWarning != nil {
			c.cfg.OnWarning(printable(string(f.payload)))
		}
	case frameHello:
		c.wmu.Lock()
		if line >= c.use {
			c.use, c.w = line, c.lines[line].w
		}
		c.wmu.Unlock()
		var h helloFrame
		_ = json.Unmarshal(f.payload, &h) // a hello is a hello
		c.set(func(s *ControlState) { s.Hello, s.Release = true, printable(h.Release) })
	case frameExit:
		if len(f.payload) == 8 {
			status, signal := binary.LittleEndian.Uint32(f.payload), binary.LittleEndian.Uint32(f.payload[4:])
			c.set(func(s *ControlState) {
				s.Exited, s.Status, s.Signal = true, int(status&0xff), int(signal&0x7f)
				if s.Signal != 0 {
					s.Status = 128 + s.Signal
				}
			})
		}
	case frameError:
		var e GuestError
		if err := json.Unmarshal(f.payload, &e); err != nil {
			e = GuestError{Kind: FailInternal, Message: string(f.payload)}
		}
		e.Message, e.Kind, e.Status = printable(e.Message), printable(e.Kind), e.Status&0xff
		c.set(func(s *ControlState) {
			if s.Failure == nil {
				s.Failure = &e
			}
		})
	case frameBye:
		c.set(func(s *ControlState) { s.Bye = true })
		if c.onBye != nil {
			c.onBye()
		}
	case frameCredit:
		if len(f.payload) == 4 {
			c.grant(binary.LittleEndian.Uint32(f.payload))
		}
	}
	return nil
}

func (c *Control) set(f func(*ControlState)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.state)
}

// grant allows more stdin. A guest cannot make the host buffer anything: what
// is granted is only ever read and sent.
func (c *Control) grant(n uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.credit = int(min(int64(c.credit)+int64(n), maxCredit))
	if !c.stdin {
		c.stdin = true
		go c.sendStdin()
	}
	c.wake.Broadcast()
}

// sendStdin starts with the first credit, so that nothing is taken from the
// host's stdin for a guest that never gets to its command.
func (c *Control) sendStdin() {
	buf := make([]byte, maxFrame)
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
			if c.send(frameStdin, buf[:n]) != nil {
				return
			}
		}
		if err != nil {
			break
		}
	}
	_ = c.send(frameStdinEOF, nil)
}

// send writes one frame.
func (c *Control) send(kind frameType, payload []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	_, err := c.w.Write(appendFrame(nil, kind, payload))
	return err
}

// Resize tells the guest the size of the terminal, in characters.
func (c *Control) Resize(rows, columns uint16) error {
	var b []byte
	b = binary.LittleEndian.AppendUint16(b, rows)
	b = binary.LittleEndian.AppendUint16(b, columns)
	return c.send(frameResize, b)
}

// Signal sends a signal, by its Linux number, to the command (its process
// group). Number 0 sends none, as with kill(2): it only reaches the guest.
func (c *Control) Signal(number int) error {
	if number < 0 || number > 64 {
		return fmt.Errorf("control line: %d is not a signal", number)
	}
	return c.send(frameSignal, []byte{byte(number)})
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

// printable makes text of the guest safe for a terminal and a log line.
func printable(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == utf8.RuneError:
			return '?'
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r >= 0x7f && r < 0xa0:
			return '?'
		}
		return r
	}, s)
}
