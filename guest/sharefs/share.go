package sharefs

import "errors"

// Options say how a folder is shared.
type Options struct {
	// Writable lets the guest change the folder.
	Writable bool
	// MaxFiles bounds the files the guest has open or refers to at a time;
	// 0 means FilesEach(1), what is right for the only share of a process.
	MaxFiles int
}

// ErrNotDirectory says that what should be shared is no folder.
var ErrNotDirectory = errors.New("sharefs: not a folder")
