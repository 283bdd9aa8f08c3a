package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

// A stream stands still, goes on, and the agent is told who it is; what it
// cannot become the client learns.
func TestHold(t *testing.T) {
	r1, w1 := io.Pipe()
	r2, w2 := io.Pipe()
	var got []Identity
	holds := 0
	hooks := Hooks{Hold: func() { holds++ }, Go: func(id Identity) error {
		got = append(got, id)
		if id.Hostname == "bad" {
			return errors.New("no\x1b name")
		}
		return nil
	}}
	served := make(chan error, 1)
	go func() { served <- Serve(r1, w2, hooks); w2.Close() }()
	c := NewClient(r2, w1)
	// A command that writes all the time, and more than is granted.
	busy, err := c.Start(sh("exec yes"), nil, io.Discard, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		h, err := c.Hold(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if h.Commands() != uint32(i+1) {
			t.Errorf("%d commands", h.Commands())
		}
		if err := h.Go(t.Context(), Identity{Hostname: "name", Entropy: []byte("1234")}); err != nil {
			t.Fatal(err)
		}
		if out, _, exit := run(t, c, sh("echo hello"), nil); out != "hello\n" || exit.Status != 0 {
			t.Fatalf("%q %+v", out, exit)
		}
	}
	h, err := c.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Go(t.Context(), Identity{Hostname: "bad"}); !errors.Is(err, ErrIdentity) || !strings.HasSuffix(err.Error(), ": no? name") {
		t.Errorf("%v", err)
	}
	busy.Kill()
	<-busy.Done()
	w1.Close()
	<-served
	<-c.Done()
	if holds != 21 || len(got) != 21 || string(got[0].Entropy) != "1234" || got[0].Clone {
		t.Errorf("held %d times, %+v", holds, got)
	}
	if _, err := c.Hold(t.Context()); !errors.Is(err, ErrGone) {
		t.Errorf("an agent that has gone is held: %v", err)
	}
}

// A clone's client takes over where the first one stood still: commands of
// before run on unheard, and new ones work. Here the agent is the same one; in
// a clone it is a copy.
func TestHoldClone(t *testing.T) {
	r1, w1 := io.Pipe()
	out := newTap()
	served := make(chan error, 1)
	go func() { served <- Serve(r1, out, Hooks{}) }()
	r2, w2 := io.Pipe()
	out.to(w2)
	c := NewClient(r2, w1)
	var heard bytes.Buffer
	if _, err := c.Start(sh("read x; echo ended; exec yes"), neverRead{t.Context()}, &heard, nil); err != nil {
		t.Fatal(err)
	}
	h, err := c.Hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r3, w3 := io.Pipe()
	out.to(w3)
	clone, held := Clone(r3, w1, h.Commands())
	if err := held.Go(t.Context(), Identity{Clone: true}); err != nil {
		t.Fatal(err)
	}
	w2.Close()
	<-c.Done()
	if err := h.Go(t.Context(), Identity{}); !errors.Is(err, ErrGone) {
		t.Errorf("the first client goes on: %v", err)
	}
	for range 10 {
		if out, _, exit := run(t, clone, sh("cat; exit 3"), strings.NewReader("in")); out != "in" || exit.Status != 3 {
			t.Fatalf("%q %+v", out, exit)
		}
	}
	w1.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	w3.Close()
	<-clone.Done()
	if heard.Len() > 0 {
		t.Errorf("the first client heard %.100q", heard.String())
	}
}

// neverRead is a stdin on which nothing comes until the test ends.
type neverRead struct{ ctx context.Context }

func (n neverRead) Read([]byte) (int, error) { <-n.ctx.Done(); return 0, io.EOF }

// tap is a writer that leads elsewhere from one frame to the next.
type tap struct{ at chan io.Writer }

func newTap() *tap { return &tap{make(chan io.Writer, 1)} }

func (x *tap) to(w io.Writer) {
	select {
	case <-x.at:
	default:
	}
	x.at <- w
}

func (x *tap) Write(p []byte) (int, error) {
	w := <-x.at
	x.at <- w
	return w.Write(p)
}

// A client that does not wait for the end of a Hold does not leave the stream
// standing still.
func TestHoldGivenUp(t *testing.T) {
	r1, w1 := io.Pipe()
	r2, w2 := io.Pipe()
	release := make(chan struct{})
	served := make(chan error, 1)
	go func() { served <- Serve(r1, w2, Hooks{Hold: func() { <-release }}); w2.Close() }()
	c := NewClient(r2, w1)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Hold(ctx); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	close(release)
	if out, _, _ := run(t, c, sh("echo on"), nil); out != "on\n" {
		t.Errorf("%q", out)
	}
	w1.Close()
	<-served
	<-c.Done()
}
