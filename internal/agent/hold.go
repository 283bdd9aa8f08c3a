package agent

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/moovm/moovm/internal/bytejson"
)

// Identity is what an agent is told when its stream goes on.
type Identity struct {
	// Clone says that the agent's machine is a copy of the one that stood still:
	// what ran there runs on, but its streams are the other's.
	Clone bool `json:"clone,omitempty"`
	// Entropy is for the kernel's random numbers, before anything else.
	Entropy []byte `json:"entropy,omitempty"`
	// Hostname and MachineID are set if they are not empty.
	Hostname  string `json:"hostname,omitempty"`
	MachineID string `json:"machine_id,omitempty"`
	// Time is the wall clock in ns since 1970; 0 leaves the clock as it is.
	Time int64 `json:"time,omitempty"`
	// Forget makes the guest forget what it has cached of its disks and files.
	Forget bool `json:"forget,omitempty"`
}

// ErrIdentity says that an agent could not become what it was told.
var ErrIdentity = errors.New("the guest could not take on its identity")

// Held is a stream that stands still: between two frames, in both directions,
// with nothing under way. A copy of the agent's machine that is made meanwhile
// has an agent that waits for Go, too: see Clone.
type Held struct {
	c    *Client
	next uint32
}

// Hold lets the stream stand still, until Go; commands run on, but wait when
// they have written much. Other calls wait meanwhile.
func (c *Client) Hold(ctx context.Context) (*Held, error) {
	c.w.mu.Lock()
	if err := c.w.writeLocked(Frame{Kind: KindHold}); err != nil {
		c.w.mu.Unlock()
		return nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	h := &Held{c: c}
	if _, err := c.reply(ctx, KindHeld); err != nil {
		// It may stand still any time now: then it must go on.
		go func() {
			if _, err := c.reply(context.Background(), KindHeld); err == nil {
				_ = h.Go(context.Background(), Identity{})
			} else {
				c.w.mu.Unlock()
			}
		}()
		return nil, err
	}
	c.mu.Lock()
	h.next = c.next
	c.mu.Unlock()
	return h, nil
}

// reply waits for a frame of the kind.
func (c *Client) reply(ctx context.Context, kind Kind) (Frame, error) {
	for {
		select {
		case f := <-c.replies:
			if f.Kind == kind {
				return f, nil
			}
		case <-c.done:
			return Frame{}, c.ended()
		case <-ctx.Done():
			return Frame{}, context.Cause(ctx)
		}
	}
}

// ended is why the client ended.
func (c *Client) ended() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

// Commands is how many commands had been started when the stream was held.
func (h *Held) Commands() uint32 { return h.next }

// Clone is a client of a copy of an agent that stood still, and the copy's
// stream, which waits for Go; r and w lead to it. commands is Held.Commands of
// the original. The original's commands run on in the copy, but what they write
// is thrown away and what they read has ended.
func Clone(r io.Reader, w io.Writer, commands uint32) (*Client, *Held) {
	c := newClient(w)
	c.next = commands
	c.w.mu.Lock()
	go c.serve(r)
	return c, &Held{c: c, next: commands}
}

// Go lets the stream go on. It must be called once. The error matches ErrIdentity
// if the agent could not do what id says; the stream goes on nevertheless.
func (h *Held) Go(ctx context.Context, id Identity) error {
	b, err := bytejson.Marshal(id)
	if err == nil {
		err = h.c.w.writeLocked(Frame{Kind: KindGo, Payload: b})
	}
	if err != nil {
		h.c.w.mu.Unlock()
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	f, err := h.c.reply(ctx, KindGone)
	h.c.w.mu.Unlock()
	if err == nil && len(f.Payload) > 0 {
		err = fmt.Errorf("%w: %s", ErrIdentity, printable(f.Payload))
	}
	return err
}

// printable bounds and cleans a text of the other end.
func printable(p []byte) string {
	const most = 1000
	p = p[:min(len(p), most)]
	out := make([]byte, 0, len(p))
	for _, c := range p {
		if c < ' ' || c > '~' {
			c = '?'
		}
		out = append(out, c)
	}
	return string(out)
}
