package ctl

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Version is the version of the interface that this package speaks: the first
// part of its paths.
const Version = 1

const (
	// maxBody bounds what a request may say, in bytes.
	maxBody = 64 << 10
	// maxClients bounds how many connections there are at a time.
	maxClients = 128
	// slow is how long a client may take for a piece of what it is sent.
	slow = 30 * time.Second
)

//go:embed openapi.json
var openAPI []byte

// OpenAPI returns the description of the interface, as JSON of OpenAPI 3.0.
func OpenAPI() []byte { return append([]byte(nil), openAPI...) }

// Options are what a Server knows beside the machine.
type Options struct {
	// Version is the program's, for GET /version.
	Version string
	// Console is the machine's; nil if there is none to be read.
	Console *Console
	// Keys takes what clients type on the console; nil if nobody may. A Write
	// that blocks holds up who types.
	Keys io.Writer
}

// Server serves one machine on any number of connections.
type Server struct {
	m    Machine
	o    Options
	hub  hub
	http *http.Server

	ending context.Context // ends what streams
	end    context.CancelFunc
	keys   sync.Mutex // one client's keys at a time
}

// NewServer returns a server of m.
func NewServer(m Machine, o Options) *Server {
	s := &Server{m: m, o: o}
	s.ending, s.end = context.WithCancel(context.Background())
	s.http = &http.Server{
		Handler:           s.Handler(),
		ReadHeaderTimeout: slow,
		IdleTimeout:       10 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          log.New(io.Discard, "", 0), // clients that go are no news
	}
	return s
}

// Serve answers on l until Close; then it returns nil.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(&limitListener{Listener: l, slots: make(chan struct{}, maxClients)}); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Close ends the server with its connections. Answers that are being given have
// a second. It is idempotent.
func (s *Server) Close() error {
	s.hub.tell(Event{Kind: "stopped"})
	s.end()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		return s.http.Close()
	}
	return nil
}

// route is a request of the interface.
type route struct {
	pattern string
	do      func(*Server, http.ResponseWriter, *http.Request) error
	streams bool // the request's body, which has any length and takes any time
}

// routes are all of them.
var routes = []route{
	{"GET /version", (*Server).getVersion, false},
	{"GET /openapi.json", (*Server).getOpenAPI, false},
	{"GET /v1/status", (*Server).getStatus, false},
	{"GET /v1/metrics", (*Server).getMetrics, false},
	{"GET /v1/events", (*Server).getEvents, false},
	{"GET /v1/console", (*Server).getConsole, false},
	{"POST /v1/console", (*Server).postConsole, true},
	{"POST /v1/pause", action("paused", Machine.Pause), false},
	{"POST /v1/resume", action("resumed", Machine.Resume), false},
	{"POST /v1/power-button", action("power-button", Machine.PowerButton), false},
	{"POST /v1/reset", action("reset", Machine.Reset), false},
	{"POST /v1/stop", action("", Machine.Stop), false}, // the end tells itself
	{"POST /v1/disk-snapshot", (*Server).postDiskSnapshot, false},
}

// Handler returns the interface as a handler, for a server of one's own: who
// may ask is that server's business then.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	for _, r := range routes {
		mux.HandleFunc(r.pattern, func(w http.ResponseWriter, req *http.Request) {
			if !r.streams {
				req.Body = http.MaxBytesReader(w, req.Body, maxBody)
				_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(slow)) // not all can: then it waits
			}
			if err := r.do(s, w, req); err != nil {
				fail(w, err)
			}
		})
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, req *http.Request) {
		answer(w, http.StatusNotFound, problem{Error: fmt.Sprintf("there is no %s %s; GET /openapi.json says what there is", req.Method, req.URL.Path)})
	})
	return mux
}

// fail answers with an error.
func fail(w http.ResponseWriter, err error) {
	p, status := problemOf(err)
	if large := (*http.MaxBytesError)(nil); errors.As(err, &large) {
		status = http.StatusRequestEntityTooLarge
	}
	if some := (*partly)(nil); errors.As(err, &some) {
		p.Done = some.done
	}
	answer(w, status, p)
}

func answer(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil { // never: these are plain data
		status, b = http.StatusInternalServerError, []byte(`{"error":"the answer cannot be written"}`)
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // who asked may be gone
}

// read reads a request's JSON into v.
func read(req *http.Request, v any) error {
	d := json.NewDecoder(req.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fmt.Errorf("%w: the body is not what openapi.json says: %w", ErrRequest, err)
	}
	if d.More() {
		return fmt.Errorf("%w: there is more behind the body", ErrRequest)
	}
	return nil
}

// action is a request without a body and an answer.
func action(event string, do func(Machine) error) func(*Server, http.ResponseWriter, *http.Request) error {
	return func(s *Server, w http.ResponseWriter, _ *http.Request) error {
		if err := do(s.m); err != nil {
			return err
		}
		if event != "" {
			s.hub.tell(Event{Kind: event})
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
}

// Versions says what a server speaks.
type Versions struct {
	Version string `json:"version"` // the program's
	API     []int  `json:"api"`
}

func (s *Server) getVersion(w http.ResponseWriter, _ *http.Request) error {
	answer(w, http.StatusOK, Versions{s.o.Version, []int{Version}})
	return nil
}

func (s *Server) getOpenAPI(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(openAPI) // who asked may be gone
	return nil
}

func (s *Server) getStatus(w http.ResponseWriter, _ *http.Request) error {
	answer(w, http.StatusOK, s.m.Status())
	return nil
}

func (s *Server) getMetrics(w http.ResponseWriter, _ *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	s.m.WriteMetrics(w)
	return nil
}

// snapshotRequest names a new overlay for each disk that is to be frozen.
type snapshotRequest struct {
	Overlays map[string]string `json:"overlays"`
}

// partly is an error after some disks were frozen.
type partly struct {
	error
	done []string
}

func (e *partly) Unwrap() error { return e.error }

func (s *Server) postDiskSnapshot(w http.ResponseWriter, req *http.Request) error {
	var r snapshotRequest
	if err := read(req, &r); err != nil {
		return err
	}
	if len(r.Overlays) == 0 {
		return fmt.Errorf("%w: no disk is named", ErrRequest)
	}
	done, err := s.m.SnapshotDisks(req.Context(), r.Overlays)
	for _, d := range done {
		s.hub.tell(Event{Kind: "disk-snapshot", Disk: d, Path: r.Overlays[d]})
	}
	if err != nil {
		return &partly{err, done}
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// query is a number that a request's URL may name.
func query(req *http.Request, name string, otherwise float64) (float64, error) {
	text := req.URL.Query().Get(name)
	if text == "" {
		return otherwise, nil
	}
	v, err := strconv.ParseFloat(text, 64)
	if err != nil || !(v >= 0 && v <= 1e9) { // NaN, too
		return 0, fmt.Errorf("%w: %s=%q is no number from 0 to 1e9", ErrRequest, name, text)
	}
	return v, nil
}
