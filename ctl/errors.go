package ctl

import (
	"errors"
	"net/http"
)

// kinds are the errors that travel, with their names on the wire and the HTTP
// status that says the same.
var kinds = []struct {
	err    error
	name   string
	status int
}{
	{ErrRequest, "bad-request", http.StatusBadRequest},
	{ErrNotAllowed, "not-allowed", http.StatusForbidden},
	{ErrNoDisk, "no-disk", http.StatusNotFound},
	{ErrState, "state", http.StatusConflict},
}

// problem is an error on the wire.
type problem struct {
	Error string `json:"error"`
	Kind  string `json:"kind,omitempty"`
	// Done are the disks that were frozen before the error.
	Done []string `json:"done,omitempty"`
}

func problemOf(err error) (problem, int) {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return problem{Error: err.Error(), Kind: k.name}, k.status
		}
	}
	return problem{Error: err.Error()}, http.StatusInternalServerError
}

// Error is what a server answered instead of doing what it was asked.
type Error struct {
	// Message is the server's sentence.
	Message string
	// Status is the answer's HTTP status.
	Status int
	// Done are the disks that were frozen before the error.
	Done []string

	kind string
}

// Error implements error.
func (e *Error) Error() string { return e.Message }

// Is reports whether the error is of the kind of one of this package's.
func (e *Error) Is(target error) bool {
	for _, k := range kinds {
		if k.err == target {
			return k.name == e.kind
		}
	}
	return false
}
