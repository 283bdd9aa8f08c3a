package main

import (
	"fmt"
	"io"
	"os"

	"golang.org/x/term"
)

// escapeKey is Ctrl-A, as in QEMU.
const escapeKey = 'a' & 0x1f

const escapeHelp = "\r\nCtrl-A x  stop the machine\r\nCtrl-A h  this help\r\nCtrl-A Ctrl-A  send Ctrl-A\r\n"

// escapeReader passes what is typed on to the guest and acts on Ctrl-A.
type escapeReader struct {
	in      io.Reader
	help    io.Writer
	quit    func()
	escaped bool // the last key was Ctrl-A
}

// Read never returns (0, nil) for a p that is not empty: keys that are not for
// the guest are swallowed and the next ones awaited.
func (r *escapeReader) Read(p []byte) (int, error) {
	for {
		n, err := r.in.Read(p)
		keep := p[:0]
		for _, key := range p[:n] {
			switch {
			case r.escaped:
				r.escaped = false
				switch key {
				case 'x', 'X':
					r.quit()
				case 'h', 'H', '?':
					io.WriteString(r.help, escapeHelp)
				case escapeKey:
					keep = append(keep, key)
				}
			case key == escapeKey:
				r.escaped = true
			default:
				keep = append(keep, key)
			}
		}
		if len(keep) > 0 || err != nil || len(p) == 0 {
			return len(keep), err
		}
	}
}

// rawTerminal puts the terminal on standard input into raw mode, if there is
// one. The returned function restores it and may be called twice.
func rawTerminal() (raw bool, restore func(), err error) {
	fd := int(os.Stdin.Fd())
	if !term.IsTerminal(fd) || !term.IsTerminal(int(os.Stdout.Fd())) {
		return false, func() {}, nil
	}
	state, err := term.MakeRaw(fd)
	if err != nil {
		return false, nil, fmt.Errorf("set the terminal to raw mode: %w", err)
	}
	return true, func() { term.Restore(fd, state) }, nil
}
