package guesttest

import (
	"context"
	"fmt"
	"os"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/agent"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/internal/reexec"
)

// M is *testing.M. Programs that only run test binaries, with Run, do not link
// package testing with its flags.
type M interface{ Run() int }

// TB is what Start needs of a testing.TB.
type TB interface {
	Cleanup(func())
	Error(args ...any)
	Errorf(format string, args ...any)
	Failed() bool
	Fatal(args ...any)
	Fatalf(format string, args ...any)
	Helper()
	Log(args ...any)
	Logf(format string, args ...any)
	Name() string
}

// Main is for TestMain: it runs the package's tests as root in a guest. On the
// host it boots a machine in which this same test binary is the init and the
// command, and ends with its exit status; in the guest it runs the tests. It
// does not return.
//
//	func TestMain(m *testing.M) { guesttest.Main(m) }
//
// $MOOVM_KERNEL (a list) and $MOOVM_TEST_ARTIFACTS change the configuration
// from outside.
func Main(m M, options ...func(*Config)) {
	Hook()
	if InGuest() {
		os.Exit(m.Run())
	}
	var c Config
	for _, o := range options {
		o(&c)
	}
	if dir := os.Getenv("MOOVM_TEST_ARTIFACTS"); dir != "" {
		c.Artifacts = dir
	}
	self, err := reexec.Path()
	status := guest.StatusCannotRun
	if err == nil {
		status, err = Run(context.Background(), c, self, os.Args[1:])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "moovm:", printable.Lines(err.Error()))
	}
	os.Exit(status)
}

// HostMain is for the TestMain of packages whose tests boot guests with Start.
// They run on the host if its KVM works; else the whole test binary runs once
// more on the sandbox's emulated host, where it does. It does not return.
func HostMain(m M) {
	Hook()
	if InGuest() || host.InSandbox() {
		os.Exit(m.Run())
	}
	status, err := hostMain(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "moovm:", printable.Lines(err.Error()))
	}
	os.Exit(status)
}

func hostMain(m M) (int, error) {
	self, err := reexec.Path()
	if err != nil {
		return guest.StatusCannotRun, err
	}
	r, err := newRunner(Config{}, self, os.Args[1:])
	if err != nil {
		return guest.StatusCannotRun, err
	}
	if !r.place.Sandbox {
		return m.Run(), nil
	}
	return r.run(context.Background(), r.job.Config.Kernels[0], true, func(j *job, box sandboxed) (int, error) {
		signals, stop := signalsTo()
		defer stop()
		return box.Run(agent.Command{
			Args: append([]string{self}, j.Args...), Env: append(j.Env, host.SandboxEnv+"=1"), Dir: j.Dir, Merge: j.Merge,
		}, signals)
	})
}
