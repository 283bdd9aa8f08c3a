package ctl

import (
	"context"
	"errors"
	"io"
	"time"
)

// Errors that a Machine's methods return, wrapped, for what is no failure of
// the machine. They travel: a Client's errors match them as well.
var (
	// ErrNoDisk: the machine has no disk of that name.
	ErrNoDisk = errors.New("no such disk")
	// ErrState: not in the state that the machine is in.
	ErrState = errors.New("the machine's state does not allow it")
	// ErrNotAllowed: what was asked reaches further than was granted.
	ErrNotAllowed = errors.New("not allowed")
	// ErrRequest: what was asked makes no sense.
	ErrRequest = errors.New("bad request")
)

// Machine is what a Server serves. Its methods are called from any goroutine.
type Machine interface {
	// Status says how the machine is; it must not block for long.
	Status() Status
	// Pause stops the processors, Resume lets them go on. Either is no error
	// in a machine where it is so already.
	Pause() error
	Resume() error
	// PowerButton asks the guest to switch off, Reset restarts it, Stop ends
	// it as if its power failed.
	PowerButton() error
	Reset() error
	Stop() error
	// SnapshotDisks freezes disks, by their name in the guest, all at one
	// instant: each goes on in a new overlay at the path it is given. Done are
	// the ones that do; after an error the others go on as they were.
	SnapshotDisks(ctx context.Context, overlays map[string]string) (done []string, err error)
	// WriteMetrics writes counters in Prometheus's text format.
	WriteMetrics(w io.Writer)
}

// Status is how a machine is.
type Status struct {
	// Version is the program's.
	Version string `json:"version"`
	// State is created, running, paused or stopped.
	State string `json:"state"`
	// Started is when the machine was.
	Started time.Time `json:"started"`
	CPUs    int       `json:"cpus"`
	// Memory is what the guest has, MemoryUsed what it has touched, in bytes.
	Memory     int64  `json:"memory"`
	MemoryUsed int64  `json:"memory-used"`
	Disks      []Disk `json:"disks"`
}

// Disk is a disk of a running machine.
type Disk struct {
	// Name is the guest's: vda, vdb…
	Name string `json:"name"`
	// Path is the image that is written, empty if it has no name.
	Path     string `json:"filename,omitempty"`
	ReadOnly bool   `json:"read-only"`
	// Size is the disk's, ActualSize what the image takes up, in bytes.
	Size       int64 `json:"virtual-size"`
	ActualSize int64 `json:"actual-size"`
	// Layers is how many images it consists of.
	Layers int `json:"layers"`
}
