//go:build linux

// Package ptytest runs programs on a pseudo-terminal, for tests: it types, and
// reads the screen.
package ptytest

import (
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// patience is how long a text may take to appear; guests in emulated machines
// take most of a minute to boot.
const patience = 4 * time.Minute

// Screen is a program on a terminal of its own. Its methods are for the test's
// goroutine.
type Screen struct {
	t      testing.TB
	cmd    *exec.Cmd
	master *os.File
	slave  *os.File // kept open, to ask for its mode after the program's end

	mu     sync.Mutex
	text   string
	from   int // where the next wait begins
	change chan struct{}
	ended  bool
}

// Start runs cmd on a terminal of so many rows and columns. What still runs at
// the test's end is killed.
func Start(t testing.TB, cmd *exec.Cmd, rows, columns uint16) *Screen {
	t.Helper()
	master, slave, err := pty.Open()
	if err != nil {
		t.Skipf("no pseudo-terminals here (mount devpts on /dev/pts): %v", err)
	}
	s := &Screen{t: t, cmd: cmd, master: master, slave: slave, change: make(chan struct{})}
	t.Cleanup(func() {
		if cmd.ProcessState == nil && cmd.Process != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		slave.Close()
		master.Close()
		if t.Failed() {
			t.Logf("the screen:\n%q", s.Text())
		}
	})
	s.Resize(rows, columns)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go s.read()
	return s
}

func (s *Screen) read() {
	buf := make([]byte, 4096)
	for {
		n, err := s.master.Read(buf)
		s.mu.Lock()
		s.text += string(buf[:n])
		s.ended = err != nil
		close(s.change)
		s.change = make(chan struct{})
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// Type presses keys.
func (s *Screen) Type(keys string) {
	s.t.Helper()
	if _, err := s.master.WriteString(keys); err != nil {
		s.t.Fatal(err)
	}
}

// Resize changes the terminal's size.
func (s *Screen) Resize(rows, columns uint16) {
	s.t.Helper()
	if err := pty.Setsize(s.master, &pty.Winsize{Rows: rows, Cols: columns}); err != nil {
		s.t.Fatal(err)
	}
}

// Raw says whether the terminal leaves keys alone: no echo, no lines, no
// signals.
func (s *Screen) Raw() bool {
	s.t.Helper()
	mode, err := unix.IoctlGetTermios(int(s.slave.Fd()), unix.TCGETS)
	if err != nil {
		s.t.Fatal(err)
	}
	return mode.Lflag&(unix.ECHO|unix.ICANON|unix.ISIG) == 0
}

// WaitRaw waits until the terminal is raw.
func (s *Screen) WaitRaw() {
	s.t.Helper()
	for end := time.Now().Add(patience); !s.Raw(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatal("the terminal was not put into raw mode")
		}
	}
}

// Text is all that was shown.
func (s *Screen) Text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text
}

// WaitFor waits until the text appears after what was waited for before.
func (s *Screen) WaitFor(text string) {
	s.t.Helper()
	if !s.waitFor(text, patience) {
		s.t.Fatalf("no %q on the screen", text)
	}
}

func (s *Screen) waitFor(text string, limit time.Duration) bool {
	late := time.After(limit)
	for {
		s.mu.Lock()
		at := strings.Index(s.text[s.from:], text)
		if at >= 0 {
			s.from += at + len(text)
		}
		change, ended := s.change, s.ended
		s.mu.Unlock()
		if at >= 0 || ended {
			return at >= 0
		}
		select {
		case <-change:
		case <-late:
			return false
		}
	}
}

// TypeUntil types a line again and again until the text appears: for what takes
// a while to have an effect.
func (s *Screen) TypeUntil(line, text string) {
	s.t.Helper()
	for range 60 {
		s.Type(line + "\r")
		if s.waitFor(text, 2*time.Second) {
			return
		}
	}
	s.t.Fatalf("no %q on the screen", text)
}

// Signal sends a signal to the program.
func (s *Screen) Signal(n unix.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(n); err != nil {
		s.t.Fatal(err)
	}
}

// Exit waits for the program's end and returns its exit status. The terminal
// must be as it was.
func (s *Screen) Exit() int {
	s.t.Helper()
	late := time.AfterFunc(patience, func() { _ = s.cmd.Process.Kill() })
	defer late.Stop()
	_ = s.cmd.Wait() // the status says it
	if s.Raw() {
		s.t.Error("the terminal was left in raw mode")
	}
	return s.cmd.ProcessState.ExitCode()
}
