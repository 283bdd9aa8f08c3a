package host

import (
	"context"
	"fmt"
	"os"
)

// SandboxEnv is set for everything that runs in the sandbox.
const SandboxEnv = "MOOVM_SANDBOX"

// InSandbox says whether this process runs in the sandbox.
func InSandbox() bool { return os.Getenv(SandboxEnv) != "" }

// Ways to say where guests run.
const (
	AccelAuto    = "auto"    // KVM if it is good enough, else the sandbox
	AccelKVM     = "kvm"     // nowhere but on this machine's KVM
	AccelSandbox = "sandbox" // in the sandbox, even if KVM works
)

// CheckAccel finds what is none of the Accel constants. Empty is AccelAuto.
func CheckAccel(accel string) error {
	switch accel {
	case "", AccelAuto, AccelKVM, AccelSandbox:
		return nil
	}
	return fmt.Errorf("accel %q: use auto, kvm or sandbox", accel)
}

// Probe says whether this machine's KVM runs real guest code, and why not.
type Probe func(context.Context) (usable bool, reason string, err error)

// Place is where guests run.
type Place struct {
	// Sandbox says that they run in the sandbox, else on this machine's KVM.
	Sandbox bool
	// Reason is a sentence why it is the sandbox; empty when it was asked for.
	Reason string
}

// NoKVMError says that guests cannot run on this machine's KVM, and that they
// may not, or cannot, run elsewhere.
type NoKVMError struct {
	Reason string // what the probe found
}

func (e *NoKVMError) Error() string { return e.Reason + "; see moovm doctor" }

// Choose decides where guests run. A sandbox in a sandbox would only be slower:
// there, it is KVM or a NoKVMError.
func Choose(ctx context.Context, accel string, probe Probe) (Place, error) {
	if err := CheckAccel(accel); err != nil {
		return Place{}, err
	}
	if err := Supported(); err != nil {
		return Place{}, err
	}
	inside := InSandbox()
	if accel == AccelSandbox && !inside {
		return Place{Sandbox: true}, nil
	}
	usable, reason, err := probe(ctx)
	switch {
	case err != nil:
		return Place{}, err
	case usable:
		return Place{}, nil
	case accel == AccelKVM || inside:
		return Place{}, &NoKVMError{reason}
	}
	return Place{Sandbox: true, Reason: reason}, nil
}
