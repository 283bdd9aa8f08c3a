package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Kind is what a Frame is about.
type Kind byte

// The kinds of frames.
const (
	// To the agent.
	KindStart    Kind = iota + 1 // a Command as JSON
	KindStdin                    // bytes
	KindStdinEOF                 // no more of them
	KindSignal                   // one byte, for the command's process group
	KindKill                     // end the session now
	// From the agent.
	KindStdout
	KindStderr
	KindExit // an Exit as JSON: the session's last frame
	// Both ways: so many more bytes may be sent.
	KindCredit

	// A stream that stands still, so that its ends can be copied: see Hold.
	KindHold // to the agent: nothing more comes until KindGo
	KindHeld // from it: nor will anything from here
	KindGo   // an Identity as JSON
	KindGone // text: what failed; empty = nothing
)

// MaxPayload is the size of the largest payload, in bytes.
const MaxPayload = 64 << 10

// Window is how many bytes may be on their way in one direction of a session.
const Window = 512 << 10

const headerSize = 9 // id[4] kind[1] length[4], little-endian

// A Frame belongs to one session, by its ID.
type Frame struct {
	ID      uint32
	Kind    Kind
	Payload []byte
}

// ErrFrame says that the stream is no stream of frames.
var ErrFrame = errors.New("agent: not a frame")

// ReadFrame reads one frame. At a clean end of the stream it returns io.EOF.
func ReadFrame(r io.Reader) (Frame, error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return Frame{}, err
	}
	f := Frame{ID: binary.LittleEndian.Uint32(h[:]), Kind: Kind(h[4])}
	n := binary.LittleEndian.Uint32(h[5:])
	if n > MaxPayload {
		return Frame{}, fmt.Errorf("%w: %d bytes are more than %d", ErrFrame, n, MaxPayload)
	}
	f.Payload = make([]byte, n)
	if _, err := io.ReadFull(r, f.Payload); err != nil {
		return Frame{}, io.ErrUnexpectedEOF
	}
	return f, nil
}

// AppendFrame appends the bytes of a frame to b.
func AppendFrame(b []byte, f Frame) []byte {
	b = binary.LittleEndian.AppendUint32(b, f.ID)
	b = append(b, byte(f.Kind))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(f.Payload)))
	return append(b, f.Payload...)
}

// A Writer writes frames, one at a time.
type Writer struct {
	mu sync.Mutex
	w  io.Writer
}

// NewWriter returns a Writer to w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Write writes one frame. It may be called from any goroutine.
func (w *Writer) Write(f Frame) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.writeLocked(f)
}

func (w *Writer) writeLocked(f Frame) error {
	b := AppendFrame(make([]byte, 0, headerSize+len(f.Payload)), f)
	_, err := w.w.Write(b)
	return err
}

func (w *Writer) credit(id uint32, n int) error {
	return w.Write(Frame{id, KindCredit, binary.LittleEndian.AppendUint32(nil, uint32(n))})
}

// A Command is a program to run.
type Command struct {
	Args []string `json:"args"`
	Env  []string `json:"env,omitempty"` // all of it; PATH finds Args[0]
	Dir  string   `json:"dir,omitempty"` // empty = /
	// Merge makes stderr the same pipe as stdout.
	Merge bool `json:"merge,omitempty"`
}

// Exit is how a command ended. Status is 128 + Signal after a signal. With
// Error it did not start; Status is then what a shell says, 126 or 127.
type Exit struct {
	Status int    `json:"status"`
	Signal int    `json:"signal,omitempty"`
	Error  string `json:"error,omitempty"`
}

// Hooks are called by an agent before it starts a command, and after one has
// ended, before its end is reported. They may be nil.
//
// Hold is called when the stream stands still, and Go before it goes on; what Go
// returns the client gets.
type Hooks struct {
	Before, After func()
	Hold          func()
	Go            func(Identity) error
}

// budget is the credit of one direction.
type budget struct {
	mu     sync.Mutex
	cond   sync.Cond
	n      int
	closed bool
	drop   bool // what is sent goes nowhere
}

func newBudget() *budget {
	b := &budget{n: Window}
	b.cond.L = &b.mu
	return b
}

// wait waits for credit and returns how much there is; 0 = closed.
func (b *budget) wait() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.n <= 0 && !b.closed {
		b.cond.Wait()
	}
	if b.closed {
		return 0
	}
	return b.n
}

func (b *budget) add(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.n = min(b.n+n, Window)
	b.cond.Broadcast()
}

func (b *budget) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.cond.Broadcast()
}

// take uses n bytes up; false says that they are not wanted.
func (b *budget) take(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.drop {
		b.n -= n
	}
	return !b.drop
}

// discard is credit without end, for what goes nowhere.
func (b *budget) discard() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.n, b.drop = Window, true
	b.cond.Broadcast()
}

// send sends what is read from r as frames of the kind, as credit allows,
// until r ends or the budget is closed.
func (b *budget) send(w *Writer, id uint32, kind Kind, r io.Reader) error {
	buf := make([]byte, MaxPayload)
	for {
		n := b.wait()
		if n == 0 {
			return nil
		}
		n, err := r.Read(buf[:min(n, len(buf))])
		if n > 0 && b.take(n) {
			if err := w.Write(Frame{id, kind, buf[:n]}); err != nil {
				return err
			}
		}
		if err != nil {
			return nil
		}
	}
}

func creditOf(f Frame) int {
	if len(f.Payload) != 4 {
		return 0
	}
	return int(min(binary.LittleEndian.Uint32(f.Payload), Window))
}
