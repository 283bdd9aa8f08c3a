package main

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/term"
)

const (
	escapeKey    = 'a' & 0x1f // Ctrl-A, as in QEMU
	interruptKey = 'c' & 0x1f // Ctrl-C
)

const escapeHelp = "\r\nCtrl-A x  stop the machine\r\nCtrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A\r\n"

// maxTypeAhead is how much may be typed, or pasted, before the guest reads it.
// What is more is lost, as on every terminal.
const maxTypeAhead = 1 << 20

// terminalKeys are the keys that are not for the guest; nil functions leave
// theirs to it.
type terminalKeys struct {
	quit func() // Ctrl-A x; without it, Ctrl-A is a key like any other
	// interrupt is Ctrl-C as long as nothing runs that it could be for.
	interrupt func()
}

// terminal is the user's terminal while a guest has it: in raw mode, its keys
// read from the first moment, whether or not anybody reads them from here.
type terminal struct {
	in, out *os.File
	state   *term.State
	winch   chan os.Signal

	mu      sync.Mutex
	change  sync.Cond
	keys    terminalKeys
	escaped bool // the last key was Ctrl-A
	typed   []byte
	end     error // why no more will be typed

	restore sync.Once
}

// isTerminal says whether both are a terminal.
func isTerminal(in, out *os.File) bool {
	return term.IsTerminal(int(in.Fd())) && term.IsTerminal(int(out.Fd()))
}

// openTerminal takes the terminal over. What was typed is read from the
// result.
func openTerminal(in, out *os.File, keys terminalKeys) (*terminal, error) {
	state, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return nil, fmt.Errorf("set the terminal to raw mode: %w", err)
	}
	t := newTerminal(in, out, keys)
	t.state = state
	go t.pump(in)
	return t, nil
}

func newTerminal(in, out *os.File, keys terminalKeys) *terminal {
	t := &terminal{in: in, out: out, keys: keys, winch: make(chan os.Signal, 1)}
	t.change.L = &t.mu
	return t
}

// pump reads keys until there are no more.
func (t *terminal) pump(in io.Reader) {
	buf := make([]byte, 4096)
	for {
		n, err := in.Read(buf)
		for _, act := range t.take(buf[:n], err) {
			act()
		}
		if err != nil {
			return
		}
	}
}

// take sorts keys: those for the guest are kept, the others are the functions
// to call, in order.
func (t *terminal) take(keys []byte, end error) (acts []func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, key := range keys {
		switch {
		case t.escaped:
			t.escaped = false
			switch key {
			case 'x', 'X':
				acts = append(acts, t.keys.quit)
			case 'h', 'H', '?':
				acts = append(acts, func() { io.WriteString(t.out, escapeHelp) })
			case escapeKey:
				t.typed = append(t.typed, key)
			}
		case key == escapeKey && t.keys.quit != nil:
			t.escaped = true
		case key == interruptKey && t.keys.interrupt != nil:
			acts = append(acts, t.keys.interrupt)
		case len(t.typed) < maxTypeAhead:
			t.typed = append(t.typed, key)
		}
	}
	t.end = end
	t.change.Broadcast()
	return acts
}

// Read waits for what is typed for the guest.
func (t *terminal) Read(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.typed) == 0 && len(p) > 0 {
		if t.end != nil {
			return 0, t.end
		}
		t.change.Wait()
	}
	n := copy(p, t.typed)
	t.typed = t.typed[n:]
	return n, nil
}

// started leaves Ctrl-C to what runs now.
func (t *terminal) started() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keys.interrupt = nil
}

// Size is the terminal's, in characters; 0 if it does not know.
func (t *terminal) Size() (rows, columns uint16) {
	c, r, err := term.GetSize(int(t.out.Fd()))
	if err != nil {
		return 0, 0
	}
	return uint16(r), uint16(c)
}

// watchSize calls changed whenever the size has changed, from one goroutine,
// until Close.
func (t *terminal) watchSize(changed func(rows, columns uint16)) {
	signal.Notify(t.winch, syscall.SIGWINCH)
	go func() {
		for range t.winch {
			changed(t.Size())
		}
	}()
}

// Close gives the terminal back as it was. It is idempotent.
func (t *terminal) Close() error {
	var err error
	t.restore.Do(func() {
		signal.Stop(t.winch)
		close(t.winch)
		err = term.Restore(int(t.in.Fd()), t.state)
	})
	return err
}
