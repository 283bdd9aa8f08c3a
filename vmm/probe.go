package vmm

import (
	"context"
	"errors"
)

// ProbeResult says whether a KVM device can really run a kernel.
type ProbeResult struct {
	// Path is the device that was probed.
	Path string
	// Usable is true if every instruction of the probe ran.
	Usable bool
	// Status is the kind of result.
	Status ProbeStatus
	// Instruction is the one that failed, with Status ProbeEmulation.
	Instruction string
	// Reason is a sentence for people: why the device is not enough, or that
	// it is.
	Reason string
}

// ProbeStatus is the kind of a ProbeResult.
type ProbeStatus string

const (
	ProbeUsable     ProbeStatus = "usable"     // real hardware virtualisation
	ProbeMissing    ProbeStatus = "missing"    // there is no such device
	ProbePermission ProbeStatus = "permission" // the device may not be opened
	ProbeNotKVM     ProbeStatus = "not-kvm"    // the file is not a KVM device, or an old one
	ProbeEmulation  ProbeStatus = "emulation"  // an ordinary instruction does not run
	ProbeTimeout    ProbeStatus = "timeout"    // the guest did not finish in time
	ProbeFailed     ProbeStatus = "failed"     // KVM refused something else
)

// Probe runs a few bytes of long-mode guest code on the KVM device at path
// ("" means DefaultKVM), among them the instructions that instruction-emulating
// KVMs lack, and says whether that worked. It takes milliseconds and never
// longer than ctx or a few seconds. The error is for a ctx that ended; a KVM
// that does not work is a result, not an error.
func Probe(ctx context.Context, path string) (ProbeResult, error) {
	return ProbeResult{}, errors.New("vmm: Probe is not written yet")
}
