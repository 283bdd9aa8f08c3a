package ext4

import "errors"

// What callers can tell apart with errors.Is.
var (
	ErrFull    = errors.New("the file system is full")
	ErrInodes  = errors.New("too many files")
	ErrName    = errors.New("unusable file name")
	ErrExists  = errors.New("the name exists")
	ErrLinks   = errors.New("too many hard links")
	ErrXattr   = errors.New("unusable extended attributes")
	ErrSymlink = errors.New("unusable target of a symbolic link")
	ErrMode    = errors.New("unusable file type")
	ErrSize    = errors.New("unusable size of a file system")
)
