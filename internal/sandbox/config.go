package sandbox

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"syscall"

	"github.com/moovm/moovm/guest/control"
)

// Defaults of a Config.
const (
	DefaultMemory = 4 << 30 // bytes
	// DefaultCPUs is one: with two, QEMU 7.2's emulation now and then stalls
	// for good, and two sandboxes of one do more than one of two.
	DefaultCPUs = 1
	DefaultQEMU = "qemu-system-x86_64"
)

// ErrNoQEMU is returned when the emulator is not installed.
var ErrNoQEMU = errors.New("the sandbox needs QEMU's x86 system emulator; install it (Debian: apt-get install qemu-system-x86)")

// Config says what runs in a sandbox. Kernel, Init and Command are
// required.
type Config struct {
	// Kernel is the kernel of the emulated host: a vmlinuz or an ELF vmlinux
	// with a PVH entry.
	Kernel string
	// Modules is its …/lib/modules folder or a parent of that; empty looks for
	// it beside the kernel.
	Modules string
	// Init is the static program that becomes PID 1 of the emulated host; it
	// must call guestinit.Main when guestinit.IsInit says so.
	Init string
	// Memory is the emulated host's RAM in bytes, CPUs its processors.
	Memory int64
	CPUs   int
	// Command is what to run, with paths as on this machine.
	Command control.Command
	// Writable are what of this machine the command may change: folders with
	// all that is in them, and regular files, which keep their holes and get
	// those that the command makes. Everything it writes elsewhere is gone when
	// the sandbox ends.
	Writable []string
	// Stdin, Stdout and Stderr are the command's. Nil reads nothing, discards.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// WindowSizes are the sizes of the terminal as it changes, if the command
	// has one; may be nil.
	WindowSizes <-chan WindowSize
	// OnStart is called when the command is about to start; may be nil.
	OnStart func(what string)
	// Signals are sent to the command as they come; may be nil. One that comes
	// before the command has started ends the sandbox at once, with an
	// InterruptedError; after the second the command must end soon, the third
	// ends the sandbox.
	Signals <-chan os.Signal
	// EndSignal is what tells the command that the context has ended, for its
	// cause; nil sends SIGINT. It is not waited for ever.
	EndSignal func(cause error) syscall.Signal
	// Console takes what the emulated host's kernel says; nil discards it.
	Console io.Writer
	// QEMU is the emulator's program; empty means DefaultQEMU from PATH.
	QEMU string
	// Logger takes the package's own messages; nil discards them.
	Logger *slog.Logger
}

// InterruptedError says that a signal ended the sandbox before its command had
// started, or because the command did not end.
type InterruptedError struct{ Signal syscall.Signal }

func (e *InterruptedError) Error() string {
	return fmt.Sprintf("the sandbox was interrupted (%v)", e.Signal)
}

// WindowSize is a terminal's size in characters.
type WindowSize struct{ Rows, Columns uint16 }

func (c *Config) setDefaults() {
	if c.Memory == 0 {
		c.Memory = DefaultMemory
	}
	if c.CPUs == 0 {
		c.CPUs = DefaultCPUs
	}
	if c.QEMU == "" {
		c.QEMU = DefaultQEMU
	}
	if c.Stdout == nil {
		c.Stdout = io.Discard
	}
	if c.Stderr == nil {
		c.Stderr = io.Discard
	}
	if c.Console == nil {
		c.Console = io.Discard
	}
	if c.EndSignal == nil {
		c.EndSignal = func(error) syscall.Signal { return syscall.SIGINT }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

func (c *Config) validate() error {
	if len(c.Command.Args) == 0 {
		return errors.New("sandbox: no command to run")
	}
	if c.Memory < 512<<20 {
		return fmt.Errorf("sandbox: memory of %d MiB is too little for an emulated host; give at least 512M", c.Memory>>20)
	}
	for _, path := range c.Writable {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("sandbox: writable %q is not an absolute path", path)
		}
		switch st, err := os.Stat(path); {
		case err != nil:
			return fmt.Errorf("sandbox: writable: %w", err)
		case !st.IsDir() && !st.Mode().IsRegular():
			return fmt.Errorf("sandbox: %s is neither a folder nor a regular file, so the command cannot be given it to write to", path)
		}
	}
	return nil
}

// writable sorts what the command may write to. A file in one of the folders
// is a file all the same: 9P knows no holes.
func (c *Config) writable() (folders, files []string) {
	for _, path := range c.Writable {
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
			files = append(files, path)
		} else {
			folders = append(folders, path)
		}
	}
	return folders, files
}
