package oci

import (
	"io"
	"sync"
)

// ahead unpacks while others work on what was unpacked.
type ahead struct {
	full, free chan []byte
	stop       chan struct{}
	once       sync.Once
	done       sync.WaitGroup
	rest, buf  []byte
	err        error // of the reader; after full is closed
}

const (
	aheadBuffer = 512 << 10
	aheadCount  = 4
)

// readAhead reads r until Close, which waits for the last read.
func readAhead(r io.Reader) *ahead {
	a := &ahead{full: make(chan []byte, aheadCount), free: make(chan []byte, aheadCount), stop: make(chan struct{})}
	for range aheadCount {
		a.free <- make([]byte, aheadBuffer)
	}
	a.done.Go(func() {
		defer close(a.full)
		for {
			var b []byte
			select {
			case b = <-a.free:
			case <-a.stop:
				return
			}
			n, err := 0, error(nil)
			for n < len(b) && err == nil {
				var k int
				k, err = r.Read(b[n:])
				n += k
			}
			a.full <- b[:n] // there is room for all buffers
			if err != nil {
				a.err = err
				return
			}
		}
	})
	return a
}

func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.buf != nil {
			a.free <- a.buf[:cap(a.buf)]
			a.buf = nil
		}
		b, ok := <-a.full
		if !ok {
			if a.err == nil {
				return 0, io.ErrClosedPipe
			}
			return 0, a.err
		}
		a.buf, a.rest = b, b
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// Close ends the reading. r must return from a read that is under way.
func (a *ahead) Close() {
	a.once.Do(func() { close(a.stop) })
	a.done.Wait()
}
