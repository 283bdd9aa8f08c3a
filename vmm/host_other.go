//go:build !linux

package vmm

import "errors"

// No machine is ever made here: kvm.Open says so (host.Supported).

const (
	mapNoReserve = 0
	mayMove      = 0
	sysMremap    = 0
)

func memfd(string, bool) (int, error) { return -1, errors.ErrUnsupported }
func sealMemfd(int) error             { return errors.ErrUnsupported }
func advise([]byte)                   {}
func threadID() int                   { return 0 }
func kickThread(int)                  {}
