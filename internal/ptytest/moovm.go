//go:build linux

package ptytest

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

// A Moovm is a way to run `moovm run` with a base image that has a shell and
// stty: here, or in the sandbox.
type Moovm struct {
	Program string
	Dir     string   // its working folder
	Flags   []string // of run: the base, where the machine runs
}

func (m Moovm) start(t *testing.T, more ...string) *Screen {
	t.Helper()
	cmd := exec.Command(m.Program, append(append([]string{"run"}, m.Flags...), more...)...)
	cmd.Dir = m.Dir
	return Start(t, cmd, 33, 101)
}

// CommandTTY: with -t a command has this terminal: its size and later sizes, no
// echo but its own, Ctrl-C, its exit status.
func (m Moovm) CommandTTY(t *testing.T) {
	s := m.start(t, "-t", "--", "sh", "-c", "stty size; PS1='ready> ' exec sh")
	s.WaitFor("33 101\r\n")
	s.WaitFor("ready> ")
	if !s.Raw() {
		t.Error("the terminal is not in raw mode")
	}
	s.Resize(44, 120)
	s.TypeUntil("stty size", "44 120\r\n")
	s.TypeUntil("stty -echo; echo off$((1))", "off1\r\n")
	s.Type("read password\rhunter22\r")
	s.Type("stty echo; echo length ${#password}\r")
	s.WaitFor("length 8\r\n") // from here on keys are echoed
	s.Type("sleep 1000; echo slept\r")
	s.WaitFor("sleep 1000; echo slept")
	s.TypeUntil("\x03echo status $?", "status 130\r\n")
	s.Type("exit 5\r")
	if status := s.Exit(); status != 5 {
		t.Errorf("exit status %d, want 5", status)
	}
	// (Behind "slept" an empty line is right: the shell begins one after Ctrl-C.)
	if text := s.Text(); strings.Contains(text, "hunter22") || strings.Contains(text, "\r\r\n") || strings.Contains(text, "44 120\r\n\r\n") {
		t.Errorf("a password, or lines that end twice, on the screen: %q", text)
	}
}

// CommandQuit: Ctrl-A x ends a command on a terminal, too.
func (m Moovm) CommandQuit(t *testing.T) {
	s := m.start(t, "-t", "--", "sh", "-c", "echo running; sleep 1000")
	s.WaitFor("running\r\n")
	s.Type("\x01x")
	if status := s.Exit(); status != 0 || !strings.Contains(s.Text(), "moovm: stopped") {
		t.Errorf("exit status %d", status)
	}
}

// Console: the serial console of a guest, on whose disk a shell is the init.
func (m Moovm) Console(t *testing.T) {
	s := m.start(t, "--append", "init=/bin/sh")
	s.WaitFor("# ")
	if !s.Raw() {
		t.Error("the terminal is not in raw mode")
	}
	s.TypeUntil("echo answer $((6*7))", "answer 42\r\n")
	s.Type("\x01h")
	s.WaitFor("Ctrl-A x  stop the machine\r\n")
	s.Type("\x01x")
	if status := s.Exit(); status != 0 || !strings.Contains(s.Text(), "moovm: stopped") {
		t.Errorf("exit status %d", status)
	}
	if strings.Contains(s.Text(), "\r\r\n") {
		t.Error("lines end twice")
	}
}

// QuitAtOnce: Ctrl-A x works from the first moment.
func (m Moovm) QuitAtOnce(t *testing.T) {
	s := m.start(t)
	s.WaitRaw()
	s.Type("\x01x")
	if status := s.Exit(); status != 0 || !strings.Contains(s.Text(), "moovm: stopped") {
		t.Errorf("exit status %d", status)
	}
}

// InterruptKeyAtOnce: so does Ctrl-C, as long as there is no guest whose key it
// could be. A terminal that is not raw yet sends a signal: the same.
func (m Moovm) InterruptKeyAtOnce(t *testing.T, after time.Duration) {
	s := m.start(t)
	s.WaitRaw()
	time.Sleep(after)
	s.Type("\x03")
	if status := s.Exit(); status != 130 {
		t.Errorf("exit status %d, want 130", status)
	}
}
