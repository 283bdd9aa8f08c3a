package confine

import "errors"

// Needs is what the process still has to open after it is confined.
type Needs struct {
	// Read are folders whose files may be read, Write those whose files may
	// also be made, changed and removed.
	Read, Write []string
	// Images are folders in which files are made, with the mode that this
	// process gives new ones. For that it can look at any path that it sees:
	// that a file exists, and its attributes. With a root folder of its own
	// (Result.Root) it sees its folders only.
	Images []string
	// Remove are folders in which files may be removed: those of its own
	// sockets. Landlock cannot say which files.
	Remove []string
	// Sockets says that connections are taken on sockets that listen already,
	// and messages with descriptors exchanged over them.
	Sockets bool
	// Internet says that TCP and UDP sockets are made, connected to anything and
	// used. There are no other kinds.
	Internet bool
}

// Result says what holds now.
type Result struct {
	// Landlock is the version of Landlock that is in force; 0 if the kernel has
	// none.
	Landlock int
	// Seccomp says whether the filter of system calls is in force.
	Seccomp bool
	// Capabilities says whether those that are not needed are gone. They stay in
	// a program that is built with cgo, whose threads Go does not know.
	Capabilities bool
	// Root says whether the process has a root folder in which there is nothing
	// but its folders. It takes the right to mount.
	Root bool
}

// ErrUnsupported says that the system has no means to confine a process.
var ErrUnsupported = errors.New("this system cannot confine a process")
