package ctl

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"time"
)

// getEvents sends a line of JSON for each event, and statistics at an interval.
func (s *Server) getEvents(w http.ResponseWriter, req *http.Request) error {
	seconds, err := query(req, "interval", 1)
	if err != nil {
		return err
	}
	l := s.hub.listen()
	defer s.hub.leave(l)
	out := newStream(w, "application/jsonl")
	statistics := func() Event {
		status := s.m.Status()
		return Event{Time: time.Now().UTC(), Kind: "statistics", Status: &status}
	}
	var ticks <-chan time.Time
	if seconds > 0 {
		t := time.NewTicker(max(time.Duration(seconds*float64(time.Second)), 10*time.Millisecond))
		defer t.Stop()
		ticks = t.C
	}
	next := statistics() // how it is now
	for {
		line, err := json.Marshal(next)
		if err != nil {
			return nil // never: it is plain data
		}
		if out.write(append(line, '\n')) != nil || next.Kind == "stopped" {
			return nil
		}
		select {
		case next = <-l.c:
			continue
		default:
		}
		select {
		case next = <-l.c:
		case <-ticks:
			next = statistics()
		case <-req.Context().Done():
			return nil
		case <-s.ending.Done():
			next = Event{Time: time.Now().UTC(), Kind: "stopped"}
		}
	}
}

// getConsole sends the last output of the console, and with follow all that
// comes.
func (s *Server) getConsole(w http.ResponseWriter, req *http.Request) error {
	if s.o.Console == nil {
		return fmt.Errorf("%w: this machine's console cannot be read", ErrNotAllowed)
	}
	last, err := query(req, "last", Backlog)
	if err != nil {
		return err
	}
	follow, err := query(req, "follow", 0)
	if err != nil {
		return err
	}
	if follow == 0 {
		w.Header().Set("Content-Type", "application/octet-stream")
		_, _ = w.Write(s.o.Console.Last(int(last))) // who asked may be gone
		return nil
	}
	r := s.o.Console.Watch(int(last))
	defer r.Close()
	defer context.AfterFunc(req.Context(), func() { r.Close() })()
	defer context.AfterFunc(s.ending, func() { r.Close() })()
	out := newStream(w, "application/octet-stream")
	buf := make([]byte, 16<<10)
	for {
		n, err := r.Read(buf)
		if err != nil || out.write(buf[:n]) != nil {
			return nil
		}
	}
}

// postConsole types what the body says on the console, as it comes.
func (s *Server) postConsole(w http.ResponseWriter, req *http.Request) error {
	if s.o.Keys == nil {
		return fmt.Errorf("%w: nobody can type on this machine's console; it has the terminal of who started it, or a command", ErrNotAllowed)
	}
	if !s.keys.TryLock() {
		return fmt.Errorf("%w: somebody else is typing on the console", ErrState)
	}
	defer s.keys.Unlock()
	if _, err := io.Copy(s.o.Keys, req.Body); err != nil {
		return fmt.Errorf("%w: the console takes no keys: %w", ErrState, err)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// stream is an answer that goes on. A client that does not take its pieces in
// time loses it.
type stream struct {
	w http.ResponseWriter
	c *http.ResponseController
}

func newStream(w http.ResponseWriter, kind string) *stream {
	w.Header().Set("Content-Type", kind)
	w.WriteHeader(http.StatusOK)
	s := &stream{w, http.NewResponseController(w)}
	_ = s.c.Flush() // the client hears that there is an answer
	return s
}

func (s *stream) write(p []byte) error {
	_ = s.c.SetWriteDeadline(time.Now().Add(slow)) // not all writers can: then it waits
	if _, err := s.w.Write(p); err != nil {
		return err
	}
	return s.c.Flush()
}
