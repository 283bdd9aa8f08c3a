package oci

import (
	"errors"
	"fmt"
)

// What callers can tell apart with errors.Is.
var (
	ErrNotImage  = errors.New("not a container image")
	ErrReference = errors.New("unusable name of an image")
	ErrAmbiguous = errors.New("there are several images")
	ErrPlatform  = errors.New("there is no image for the platform")
	ErrDigest    = errors.New("the contents do not have their digest")
	ErrUnsafe    = errors.New("the name or link may not be in an image")
	ErrEntry     = errors.New("unusable entry")
	ErrTooLarge  = errors.New("the image is larger than allowed")
	ErrStalled   = errors.New("the registry stopped sending")
)

// LayerError says which layer of an image is no good.
type LayerError struct {
	Index, Count int    // which of how many, from 1
	Digest       string // the layer's, as "sha256:…"
	Path         string // the file in it, or empty
	Err          error
}

func (e *LayerError) Error() string {
	s := fmt.Sprintf("layer %d of %d (%s)", e.Index, e.Count, e.Digest)
	if e.Path != "" {
		s += fmt.Sprintf(": %.200q", e.Path)
	}
	return s + ": " + e.Err.Error()
}

func (e *LayerError) Unwrap() error { return e.Err }
