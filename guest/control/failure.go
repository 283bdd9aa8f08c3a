package control

// The kinds of a GuestError.
const (
	// FailConfig: the init cannot read its configuration.
	FailConfig = "config"
	// FailModule: a kernel module cannot be loaded.
	FailModule = "module"
	// FailRoot: the root device does not appear or cannot be mounted.
	FailRoot = "root"
	// FailMount: another file system cannot be mounted.
	FailMount = "mount"
	// FailInit: the disk has no init that can be started.
	FailInit = "init"
	// FailSetup: a line of the set-up that comes before the command failed.
	FailSetup = "setup"
	// FailCommand: the command cannot be started.
	FailCommand = "command"
	// FailInternal: the init itself is at fault.
	FailInternal = "internal"
)

// A GuestError is a failure that the init of the guest reported: the command
// did not run.
type GuestError struct {
	Kind    string `json:"kind"`    // one of the Fail constants
	Message string `json:"message"` // one sentence, made printable
	// Status is the exit status that shells give to a command that cannot be
	// started: 127 not found, 126 not executable; 0 for other kinds.
	Status int `json:"status,omitempty"`
}

func (e *GuestError) Error() string { return e.Message }
