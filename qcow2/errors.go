package qcow2

import (
	"errors"
	"strings"
)

// The kinds of error that callers can tell apart with errors.Is. The error itself is an [*Error], which names the file, the field and
// what to do; errors of the files that are read are wrapped by one.
var (
	ErrNotQCOW2     = errors.New("not a qcow2 image")
	ErrVersion      = errors.New("unknown qcow2 version")
	ErrHeader       = errors.New("damaged qcow2 header")
	ErrTruncated    = errors.New("image is truncated")
	ErrCorrupt      = errors.New("damaged qcow2 table")
	ErrCompressed   = errors.New("damaged compressed cluster")
	ErrDirty        = errors.New("image was not closed")
	ErrMarked       = errors.New("image is marked as corrupt")
	ErrEncrypted    = errors.New("image is encrypted")
	ErrExternalData = errors.New("image keeps its data in another file")
	ErrFeature      = errors.New("image needs a feature that is not known here")
	ErrBacking      = errors.New("image needs its backing file")
	ErrRead         = errors.New("cannot be read")
	ErrRange        = errors.New("beyond the end of the disk")
	ErrClosed       = errors.New("image is closed")
)

// Error says which file and which field of it is wrong, and what to do about it. errors.Is matches Kind and the chain below Err.
type Error struct {
	Name   string // the file, as the caller names it
	Field  string // the header field or part of the file; may be empty
	Kind   error  // one of the Err… values above
	Detail string // what was found; may be empty
	Remedy string // what to do; may be empty
	Err    error  // the underlying error; may be nil
}

// Error is one plain sentence: file, field, what is wrong, what to do.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Name + ": ")
	if e.Field != "" {
		b.WriteString(e.Field + ": ")
	}
	b.WriteString(e.Kind.Error())
	if e.Detail != "" {
		b.WriteString(" (" + e.Detail + ")")
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	if e.Remedy != "" {
		b.WriteString("; " + e.Remedy)
	}
	return b.String()
}

// Unwrap gives errors.Is and errors.As both the kind and the cause.
func (e *Error) Unwrap() []error {
	if e.Err != nil {
		return []error{e.Kind, e.Err}
	}
	return []error{e.Kind}
}
