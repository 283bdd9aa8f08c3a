package sharefs

import "errors"

// Options say how a folder is shared.
type Options struct {
	// Writable lets the guest change the folder.
	Writable bool
	// MaxFiles bounds the files the guest has open or refers to at a time;
	// 0 means half of what the process may open (RLIMIT_NOFILE).
	MaxFiles int
}

// ErrNotDirectory says that what should be shared is no folder.
var ErrNotDirectory = errors.New("sharefs: not a folder")
