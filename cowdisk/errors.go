package cowdisk

import (
	"errors"
	"strings"
)

// The kinds of error that callers can tell apart with errors.Is. The error itself is usually an [*Error], which names the file, the field
// and what to do.
var (
	ErrNotCOW         = errors.New("not a COW image")
	ErrTruncated      = errors.New("image is truncated")
	ErrVersion        = errors.New("unknown COW version")
	ErrHeader         = errors.New("damaged COW header")
	ErrSize           = errors.New("unusable disk size")
	ErrAmbiguous      = errors.New("the header fits more than one layout")
	ErrBackingMissing = errors.New("backing file is missing")
	ErrBackingOutside = errors.New("backing file lies outside the allowed folders")
	ErrStaleBacking   = errors.New("backing file changed after the overlay was made")
	ErrBackingLoop    = errors.New("backing files form a loop")
	ErrChainTooLong   = errors.New("too many backing files")
	ErrLocked         = errors.New("in use by another program")
	ErrReadOnly       = errors.New("cannot be written")
	ErrIsDirectory    = errors.New("is a directory")
	ErrExists         = errors.New("already exists")
	ErrClosed         = errors.New("disk is closed")
	ErrRange          = errors.New("beyond the end of the disk")
	ErrNoBit          = errors.New("the layout has no bitmap bit for this sector")
	ErrPathTooLong    = errors.New("backing path is too long for the layout")
	ErrVariant        = errors.New("layout cannot be written")
	ErrPending        = errors.New("the pending bits of the process that served the image before are unusable")
	ErrDamaged        = errors.New("image is damaged")
	ErrBusy           = errors.New("an operation of the host does not end")
	ErrFailed         = errors.New("an earlier write or sync failed")
)

// Error says which file and which field of it is wrong, and what to do about it. errors.Is matches Kind and the chain below Err.
type Error struct {
	Path   string // the file
	Field  string // the header field or part of the file; may be empty
	Kind   error  // one of the Err… values above
	Detail string // what was found; may be empty
	Remedy string // what to do; may be empty
	Err    error  // the underlying error; may be nil
}

// Error is one plain sentence: file, field, what is wrong, what to do.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Path)
	b.WriteString(": ")
	if e.Field != "" && !strings.HasPrefix(e.Kind.Error(), e.Field) {
		b.WriteString(e.Field)
		b.WriteString(": ")
	}
	b.WriteString(e.Kind.Error())
	if e.Detail != "" {
		b.WriteString(" (")
		b.WriteString(e.Detail)
		b.WriteString(")")
	}
	if e.Err != nil {
		b.WriteString(": ")
		b.WriteString(e.Err.Error())
	}
	if e.Remedy != "" {
		b.WriteString("; ")
		b.WriteString(e.Remedy)
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
