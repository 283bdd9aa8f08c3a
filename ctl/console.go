package ctl

import (
	"fmt"
	"io"
	"sync"
)

// Backlog is how much of a console's output is kept, in bytes.
const Backlog = 256 << 10

// watcherBuffer is how far a reader of a console may be behind, in bytes.
const watcherBuffer = 64 << 10

// A Console keeps the last of what a guest writes to its console, and passes it
// on to whoever watches. It is an io.Writer that never blocks and never fails.
// Its methods may be called from any goroutine.
type Console struct {
	mu       sync.Mutex
	ring     []byte // the last bytes, oldest at start
	start    int
	watchers map[*watcher]bool
	closed   bool
}

// NewConsole returns a Console without output.
func NewConsole() *Console { return &Console{watchers: map[*watcher]bool{}} }

// Write implements io.Writer.
func (c *Console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.keep(p)
	for w := range c.watchers {
		w.put(p)
	}
	return len(p), nil
}

func (c *Console) keep(p []byte) {
	if over := len(p) - Backlog; over > 0 {
		p = p[over:]
	}
	grow := min(Backlog-len(c.ring), len(p))
	if grow > 0 { // not full yet: start is 0
		c.ring = append(c.ring, p[:grow]...)
		p = p[grow:]
	}
	for len(p) > 0 {
		n := copy(c.ring[c.start:], p)
		c.start = (c.start + n) % len(c.ring)
		p = p[n:]
	}
}

// Last returns the last n bytes of output, or all that is kept if there are
// fewer.
func (c *Console) Last(n int) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last(n)
}

func (c *Console) last(n int) []byte {
	all := append(append([]byte(nil), c.ring[c.start:]...), c.ring[:c.start]...)
	return all[len(all)-min(max(n, 0), len(all)):]
}

// Watch returns a reader of the last n bytes and of all that follows. A Read
// waits for output; after Close, of the reader or of the console, it returns
// io.EOF. A reader that is too slow misses output, and is told how much in the
// place of it.
func (c *Console) Watch(n int) io.ReadCloser {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := &watcher{c: c, buf: c.last(n), closed: c.closed}
	w.cond.L = &w.mu
	c.watchers[w] = true
	return w
}

// Close ends all readers once they have read what there is. It is idempotent.
func (c *Console) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for w := range c.watchers {
		w.end()
	}
	return nil
}

type watcher struct {
	c *Console

	mu     sync.Mutex
	cond   sync.Cond
	buf    []byte
	missed int
	closed bool
}

func (w *watcher) put(p []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if room := watcherBuffer + Backlog - len(w.buf); len(p) > room || w.missed > 0 {
		w.missed += len(p)
	} else {
		w.buf = append(w.buf, p...)
	}
	w.cond.Signal()
}

// Read implements io.Reader.
func (w *watcher) Read(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.buf) == 0 && w.missed == 0 && !w.closed {
		w.cond.Wait()
	}
	if len(w.buf) == 0 && w.missed > 0 {
		w.buf, w.missed = missedNote(w.missed), 0
	}
	if len(w.buf) == 0 {
		return 0, io.EOF
	}
	n := copy(p, w.buf)
	w.buf = append(w.buf[:0], w.buf[n:]...)
	return n, nil
}

func (w *watcher) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.cond.Signal()
}

// Close implements io.Closer.
func (w *watcher) Close() error {
	w.c.mu.Lock()
	delete(w.c.watchers, w)
	w.c.mu.Unlock()
	w.end()
	return nil
}

func missedNote(n int) []byte {
	return fmt.Appendf(nil, "\r\n[moovm: %d bytes of output were missed]\r\n", n)
}
