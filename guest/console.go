package guest

import (
	"bytes"
	"github.com/moovm/moovm/internal/printable"
	"io"
	"regexp"
	"strings"
	"sync"
	"time"
)

const (
	// consoleLines and consoleLineLen bound what is kept of a console.
	consoleLines   = 100
	consoleLineLen = 500
)

// consoleLog passes a console's output on, keeps its last lines, and
// recognises a kernel panic in it. The guest writes it, so a panic is only
// believed when the machine stops or falls silent after it.
type consoleLog struct {
	out    io.Writer     // may be nil
	panics chan struct{} // told of whatever is written with or after a panic's last line

	mu      sync.Mutex
	lines   []string // ring
	first   int
	line    []byte // the one being written
	cause   string // of the last panic seen
	ended   bool   // and its last line was the last there was
	changed time.Time
}

func newConsoleLog(out io.Writer) *consoleLog {
	return &consoleLog{out: out, panics: make(chan struct{}, 1)}
}

// panicLine is how a panic begins (kernel/panic.c), with or without a
// timestamp in front.
var panicLine = regexp.MustCompile(`Kernel panic - not syncing:? ?(.*)`)

const panicEnd = "end Kernel panic - not syncing"

// Write implements io.Writer.
func (c *consoleLog) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.changed = time.Now()
	for rest := p; len(rest) > 0; {
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			c.extend(rest)
			break
		}
		c.extend(rest[:i])
		c.endLine()
		rest = rest[i+1:]
	}
	if c.ended {
		select {
		case c.panics <- struct{}{}:
		default: // the last one has not been looked at yet
		}
	}
	c.mu.Unlock()
	if c.out == nil {
		return len(p), nil
	}
	return c.out.Write(p)
}

func (c *consoleLog) extend(p []byte) {
	if room := consoleLineLen - len(c.line); len(p) > room {
		p = p[:room]
	}
	c.line = append(c.line, p...)
}

func (c *consoleLog) endLine() {
	s := shown(c.line)
	c.line = c.line[:0]
	if s == "" {
		return
	}
	if len(c.lines) < consoleLines {
		c.lines = append(c.lines, s)
	} else {
		c.lines[c.first] = s
		c.first = (c.first + 1) % consoleLines
	}
	switch m := panicLine.FindStringSubmatch(s); {
	case strings.Contains(s, panicEnd):
		c.ended = true
	case m != nil:
		c.cause, c.ended = m[1], false
		if c.cause == "" {
			c.cause = "unknown"
		}
	default:
		c.ended = false
	}
}

// shown is a line as it can be shown anywhere.
func shown(line []byte) string {
	return printable.Text(strings.TrimRight(strings.ReplaceAll(string(line), "\t", " "), "\r "))
}

// tail returns the last lines, oldest first.
func (c *consoleLog) tail() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := append([]string{}, c.lines[c.first:]...)
	out = append(out, c.lines[:c.first]...)
	if s := shown(c.line); s != "" {
		out = append(out, s)
	}
	return out
}

// panicked returns the cause of the last panic on the console.
func (c *consoleLog) panicked() (cause string, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cause, c.cause != ""
}

// hangsInPanic says whether a panic's last line was the console's last for
// quiet: the kernel stays there when it was told not to reboot.
func (c *consoleLog) hangsInPanic(quiet time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended && len(c.line) == 0 && time.Since(c.changed) >= quiet
}
