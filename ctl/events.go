package ctl

import (
	"sync"
	"time"
)

// Event is something that happened to a machine, or how it is after an interval
// (Kind "statistics").
type Event struct {
	Time time.Time `json:"time"`
	// Kind is statistics, paused, resumed, power-button, reset, stopped or
	// disk-snapshot.
	Kind string `json:"event"`
	// Disk is the disk that it is about.
	Disk string `json:"disk,omitempty"`
	// Path is the new overlay.
	Path string `json:"filename,omitempty"`
	// Status comes with statistics.
	Status *Status `json:"status,omitempty"`
	// Missed counts the events before this one that the reader was too slow
	// for.
	Missed int `json:"missed,omitempty"`
}

// hub passes events on to all who listen. The zero hub is ready.
type hub struct {
	mu        sync.Mutex
	listeners map[*listener]bool
}

// listener is one of them. Who takes from c too slowly misses events.
type listener struct {
	c      chan Event
	missed int
}

const listenerBuffer = 256

func (h *hub) listen() *listener {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.listeners == nil {
		h.listeners = map[*listener]bool{}
	}
	l := &listener{c: make(chan Event, listenerBuffer)}
	h.listeners[l] = true
	return l
}

func (h *hub) leave(l *listener) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.listeners, l)
}

// tell never blocks.
func (h *hub) tell(e Event) {
	e.Time = time.Now().UTC()
	h.mu.Lock()
	defer h.mu.Unlock()
	for l := range h.listeners {
		e.Missed = l.missed
		select {
		case l.c <- e:
			l.missed = 0
		default:
			l.missed++
		}
	}
}
