package virtio_test

import (
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio"
)

func TestEvent(t *testing.T) {
	e, err := virtio.NewEvent()
	if err != nil {
		t.Fatal(err)
	}
	for range 3 { // signals are taken together
		if err := e.Signal(); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Wait(); err != nil {
		t.Fatal(err)
	}
	woken := make(chan error)
	go func() { woken <- e.Wait() }()
	select {
	case err := <-woken:
		t.Fatalf("Wait = %v without a signal", err)
	case <-time.After(5 * time.Millisecond):
	}
	e.Signal()
	if err := <-woken; err != nil {
		t.Fatal(err)
	}
	go func() { woken <- e.Wait() }()
	time.Sleep(time.Millisecond)
	if err := errors.Join(e.Close(), e.Close()); err != nil {
		t.Fatal(err)
	}
	if err := <-woken; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Wait = %v after Close", err)
	}
	if err := e.Signal(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Signal = %v after Close", err)
	}
}

func TestEventCloseRaces(t *testing.T) {
	for range 200 {
		e, err := virtio.NewEvent()
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Add(2)
		go func() {
			defer wg.Done()
			for e.Wait() == nil {
			}
		}()
		go func() {
			defer wg.Done()
			for e.Signal() == nil {
			}
		}()
		if err := e.Close(); err != nil {
			t.Fatal(err)
		}
		wg.Wait()
	}
}
