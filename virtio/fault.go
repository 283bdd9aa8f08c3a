package virtio

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// ErrFault says that guest memory was no longer there when it was accessed.
var ErrFault = errors.New("virtio: guest memory fault")

// CatchFault calls f and turns a memory fault inside it into an error: guest
// memory that another process owns can vanish (a truncated memfd raises
// SIGBUS). Any goroutine that touches guest memory should run inside it. Other
// panics pass.
func CatchFault(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		switch r := recover().(type) {
		case nil:
		case interface {
			error
			Addr() uintptr
		}:
			err = fmt.Errorf("%w: %v", ErrFault, r)
		default:
			panic(r)
		}
	}()
	return f()
}
