// Package closing closes several things at once, and gives up on those that
// hang: a file may lie on a server that does not answer, and the end of a
// program must not wait for it.
package closing

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Limit is how long a program that is to end waits for what it closes.
const Limit = 3 * time.Second

// Item is one thing to close.
type Item struct {
	Name string // for messages, such as "disk root.cow"
	io.Closer
}

// LateError says what was not closed in time. It goes on being closed, until
// the program ends.
type LateError struct {
	Names []string
	Limit time.Duration
}

func (e *LateError) Error() string {
	return fmt.Sprintf("%s cannot be closed within %v: what it lies on hangs; what was not flushed may be lost", strings.Join(e.Names, ", "), e.Limit)
}

// Within closes all items at once and returns when they are closed, or limit
// after ended has ended: before that a slow disk gets the time it needs. The
// error joins the items' own and a *LateError.
func Within(ended context.Context, limit time.Duration, items ...Item) error {
	type result struct {
		i   int
		err error
	}
	results := make(chan result, len(items)) // nobody may be left to take them
	for i, item := range items {
		go func() { results <- result{i, item.Close()} }()
	}
	var (
		errs   []error
		closed = make([]bool, len(items))
		over   = ended.Done()
		late   <-chan time.Time
	)
	for range items {
		for waiting := true; waiting; {
			select {
			case r := <-results:
				closed[r.i], waiting = true, false
				errs = append(errs, r.err)
			case <-over:
				over, late = nil, time.After(limit)
			case <-late:
				e := &LateError{Limit: limit}
				for i, item := range items {
					if !closed[i] {
						e.Names = append(e.Names, item.Name)
					}
				}
				return errors.Join(append(errs, e)...)
			}
		}
	}
	return errors.Join(errs...)
}

// AtEnd is Within for a program that ends now.
func AtEnd(items ...Item) error {
	ended, end := context.WithCancel(context.Background())
	end()
	return Within(ended, Limit, items...)
}
