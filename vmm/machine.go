package vmm

import (
	"context"
	"errors"
)

// Machine is a virtual machine. Its methods may be called from any goroutine.
type Machine struct{}

var errNotYet = errors.New("vmm: not implemented yet")

// New builds a machine: opens KVM, makes guest memory, loads the kernel and
// sets up the devices. The guest does not run before Run.
func New(cfg Config) (*Machine, error) { return nil, errNotYet }

// Run runs the guest until it stops, and says why it did. The end of ctx stops
// it within milliseconds (reason Stopped, nil error). Run may be called once.
func (m *Machine) Run(ctx context.Context) (ExitReason, error) { return Failed, errNotYet }

// Close stops the machine and releases everything it holds. It is idempotent.
func (m *Machine) Close() error { return nil }
