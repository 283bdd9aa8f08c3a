package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

// typeKeys lets a terminal read what is typed, to its end.
func typeKeys(t *testing.T, in io.Reader, keys terminalKeys) (_ *terminal, help func() string) {
	t.Helper()
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	term := newTerminal(nil, out, keys)
	term.pump(in)
	return term, func() string {
		b, err := os.ReadFile(out.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

func TestTerminalKeys(t *testing.T) {
	for _, c := range []struct {
		name, typed, sent string
		quits, interrupts int
		help              bool
	}{
		{"a line", "ls -l\n", "ls -l\n", 0, 0, false},
		{"Ctrl-A x", "a\x01xb", "ab", 1, 0, false},
		{"help", "\x01h", "", 0, 0, true},
		{"Ctrl-A twice", "\x01\x01x", "\x01x", 0, 0, false},
		{"unknown escape", "\x01q\x01\x01", "\x01", 0, 0, false},
		{"Ctrl-C before anything runs", "a\x03b", "ab", 0, 1, false},
	} {
		for name, wrap := range map[string]func(io.Reader) io.Reader{
			"whole":    func(r io.Reader) io.Reader { return r },
			"one byte": iotest.OneByteReader,
			"data+EOF": iotest.DataErrReader,
		} {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				quits, interrupts := 0, 0
				term, help := typeKeys(t, wrap(strings.NewReader(c.typed)), terminalKeys{quit: func() { quits++ }, interrupt: func() { interrupts++ }})
				got, err := io.ReadAll(term)
				if err != nil || string(got) != c.sent || quits != c.quits || interrupts != c.interrupts || (help() != "") != c.help {
					t.Errorf("typed %q: sent %q, %d quits, %d interrupts, help %q, %v", c.typed, got, quits, interrupts, help(), err)
				}
			})
		}
	}
}

// Keys act although nobody reads from the terminal yet; what is for the guest
// waits, within bounds.
func TestTerminalTypeAhead(t *testing.T) {
	quits := 0
	term, _ := typeKeys(t, strings.NewReader(strings.Repeat("k", maxTypeAhead+5000)+"\x01x"), terminalKeys{quit: func() { quits++ }})
	if quits != 1 {
		t.Errorf("%d quits after much typing", quits)
	}
	if got, err := io.ReadAll(term); err != nil || len(got) != maxTypeAhead {
		t.Errorf("kept %d bytes, %v; want %d", len(got), err, maxTypeAhead)
	}
}

// What runs gets Ctrl-C; without an escape, it gets Ctrl-A too.
func TestTerminalStarted(t *testing.T) {
	term := newTerminal(nil, nil, terminalKeys{interrupt: func() { t.Error("interrupted") }})
	term.started()
	term.take([]byte("\x03\x01x"), io.EOF)
	if got, err := io.ReadAll(term); err != nil || string(got) != "\x03\x01x" {
		t.Errorf("sent %q, %v", got, err)
	}
}
