package ctl

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// The last bytes of all that was written, whatever the pieces.
func TestConsoleKeepsTheLast(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := NewConsole()
		var all []byte
		for i := range rapid.IntRange(0, 12).Draw(t, "pieces") {
			n := rapid.OneOf(rapid.IntRange(0, 5000), rapid.IntRange(Backlog-3, Backlog+3), rapid.IntRange(0, 3*Backlog)).Draw(t, "size")
			p := bytes.Repeat([]byte{byte(i), byte(i + 100), 7}, n/3+1)[:n]
			c.Write(p)
			all = append(all, p...)
			all = all[max(0, len(all)-Backlog):]
		}
		n := rapid.IntRange(0, 2*Backlog).Draw(t, "last")
		want := all[max(0, len(all)-n):]
		if got := c.Last(n); !bytes.Equal(got, want) {
			t.Fatalf("the last %d bytes are not the last %d written", n, len(want))
		}
		r := c.Watch(n)
		c.Close()
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("a reader got %d bytes and %v, want %d", len(got), err, len(want))
		}
	})
}

// Who does not read costs a bounded buffer, and is told what it missed.
func TestConsoleSlowReader(t *testing.T) {
	c := NewConsole()
	r := c.Watch(0).(*watcher)
	defer r.Close()
	line := bytes.Repeat([]byte("x"), 1000)
	for range 10_000 {
		c.Write(line)
	}
	if len(r.buf) > watcherBuffer+Backlog {
		t.Errorf("%d bytes are kept for a reader", len(r.buf))
	}
	c.Close()
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	kept := bytes.Count(got, []byte("x"))
	if note := string(missedNote(10_000_000 - kept)); !strings.HasSuffix(string(got), note) {
		t.Errorf("it ends in %q, want %q", got[len(got)-60:], note)
	}
}
