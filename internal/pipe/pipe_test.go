package pipe

import (
	"errors"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestPipe(t *testing.T) {
	p := New()
	var wg sync.WaitGroup
	const total = 3*Limit + 5
	wg.Go(func() {
		for n := 0; n < total; {
			k, err := p.Write(make([]byte, min(100000, total-n)))
			if err != nil {
				t.Error(err)
				break
			}
			n += k
		}
		p.Close()
		if _, err := p.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Error(err)
		}
	})
	n, err := io.Copy(io.Discard, p)
	if n != total || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	wg.Wait()
	// A writer that waits for room is let go.
	p = New()
	if _, err := p.Write(make([]byte, Limit)); err != nil {
		t.Error(err)
	}
	wg.Go(func() {
		if _, err := p.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Error(err)
		}
	})
	p.Close()
	wg.Wait()
}

// A reader that waits a moment is told not to.
func TestHurry(t *testing.T) {
	p := New()
	for range 20 {
		done := make(chan struct{})
		go func() {
			defer close(done)
			if n, err := p.ReadSoon(make([]byte, 1), time.Hour); n != 0 || err != nil {
				t.Error(n, err)
			}
		}()
		for waits := true; waits; {
			p.Hurry() // it may not wait yet
			select {
			case <-done:
				waits = false
			default:
				runtime.Gosched()
			}
		}
	}
}
