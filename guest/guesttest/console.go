package guesttest

import (
	"context"
	"fmt"
	"io"
	"regexp"
	"strings"
	"sync"
)

// maxConsole bounds what is kept of a console, in bytes.
const maxConsole = 8 << 20

// Console is a guest's serial console: what is said there, and a keyboard.
type Console struct {
	sink func([]byte)
	in   *input

	mu     sync.Mutex
	text   []byte
	from   int           // where the next wait begins
	change chan struct{} // closed and replaced when there is more
	ended  bool
}

func newConsole(sink func([]byte)) *Console {
	return &Console{sink: sink, change: make(chan struct{})}
}

// Write takes what the guest says. It is for the machine.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.text = append(c.text, p...)
	if over := len(c.text) - maxConsole; over > maxConsole/4 {
		c.text = append([]byte(nil), c.text[over:]...)
		c.from = max(0, c.from-over)
	}
	close(c.change)
	c.change = make(chan struct{})
	c.mu.Unlock()
	if c.sink != nil {
		c.sink(p)
	}
	return len(p), nil
}

func (c *Console) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ended {
		c.ended = true
		close(c.change)
		c.change = make(chan struct{})
	}
}

// Text is all that was said.
func (c *Console) Text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text)
}

// Send types a line.
func (c *Console) Send(line string) error {
	_, err := c.in.Write([]byte(line + "\n"))
	return err
}

// WaitFor waits until the text appears after what was waited for before.
func (c *Console) WaitFor(ctx context.Context, text string) error {
	_, err := c.WaitForMatch(ctx, regexp.MustCompile(regexp.QuoteMeta(text)))
	return err
}

// WaitForMatch waits for a regular expression and returns the match with its
// groups. It is tried whenever something has come, which may end in the middle
// of a word: after a part of no certain length it should ask for what comes
// next, as in `took (\d+)\s`.
func (c *Console) WaitForMatch(ctx context.Context, re *regexp.Regexp) ([]string, error) {
	for {
		c.mu.Lock()
		rest := c.text[c.from:]
		if at := re.FindSubmatchIndex(rest); at != nil {
			var groups []string
			for i := 0; i < len(at); i += 2 {
				s := ""
				if at[i] >= 0 {
					s = string(rest[at[i]:at[i+1]])
				}
				groups = append(groups, s)
			}
			c.from += at[1]
			c.mu.Unlock()
			return groups, nil
		}
		ended, change, tail := c.ended, c.change, lastLines(string(c.text), 20)
		c.mu.Unlock()
		if ended {
			return nil, fmt.Errorf("the guest ended without saying %q on its console; its last lines:\n%s", re, tail)
		}
		select {
		case <-change:
		case <-ctx.Done():
			return nil, fmt.Errorf("no %q on the console: %w; its last lines:\n%s", re, context.Cause(ctx), tail)
		}
	}
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimRight(s, "\r\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// input is what is typed, without a limit and without waiting.
type input struct {
	mu     sync.Mutex
	cond   sync.Cond
	buf    []byte
	closed bool
}

func newInput() *input {
	i := &input{}
	i.cond.L = &i.mu
	return i
}

func (i *input) Write(p []byte) (int, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.closed {
		return 0, io.ErrClosedPipe
	}
	i.buf = append(i.buf, p...)
	i.cond.Broadcast()
	return len(p), nil
}

func (i *input) Read(p []byte) (int, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for len(i.buf) == 0 {
		if i.closed {
			return 0, io.EOF
		}
		i.cond.Wait()
	}
	n := copy(p, i.buf)
	i.buf = i.buf[n:]
	return n, nil
}

func (i *input) Close() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.closed = true
	i.cond.Broadcast()
	return nil
}
