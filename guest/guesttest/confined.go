package guesttest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/internal/confine"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/internal/printable"
	"github.com/moovm/moovm/internal/reexec"
	"github.com/moovm/moovm/vmm"
)

// A guest of tests runs in a process of its own, which confines itself before
// the guest's first instruction: the process that started it goes on to write
// files where the flags say.

// guestRole runs the guest of the job in the file that it is told, once.
func guestRole() reexec.Role { return reexec.Role{Name: "test-guest", Main: runGuestFile} }

// againFile, in the job's Tmp, says that the guest was reset and may start anew.
const againFile = "again"

// runGuest runs a job on this machine's KVM.
func runGuest(j job, signals <-chan os.Signal) (int, error) {
	for try := 1; ; try++ {
		j.Last = !host.InSandbox() || try == bootTries
		status, again, err := runGuestProcess(j, signals)
		if err != nil || !again {
			return status, err
		}
		fmt.Fprintln(os.Stderr, "moovm: the emulated processor reset the guest while it booted; once more")
	}
}

// runGuestProcess starts the process that runs the guest and waits for it.
func runGuestProcess(j job, signals <-chan os.Signal) (status int, again bool, err error) {
	fail := func(err error) (int, bool, error) { return guest.StatusCannotRun, false, err }
	if j.Tmp, err = os.MkdirTemp("", "moovm-disks-"); err != nil {
		return fail(err)
	}
	defer os.RemoveAll(j.Tmp)
	path := filepath.Join(j.Tmp, "job.json")
	if err := j.save(path); err != nil {
		return fail(err)
	}
	self, err := reexec.Path()
	if err != nil {
		return fail(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), guestRole().Env(path))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// A session of its own: what is typed at the terminal signals only this
	// process, which passes it on. Pdeathsig is about the thread that starts it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return fail(err)
	}
	done, passed := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(passed)
		for {
			select {
			case sig := <-signals:
				_ = cmd.Process.Signal(sig)
			case <-done:
				return
			}
		}
	}()
	err = cmd.Wait()
	close(done)
	<-passed
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || !exit.Exited()) {
		return fail(fmt.Errorf("the process that runs the guest: %w", err))
	}
	_, missing := os.Lstat(filepath.Join(j.Tmp, againFile))
	return cmd.ProcessState.ExitCode(), missing == nil, nil
}

// runGuestFile is that process. It reports errors itself.
func runGuestFile(path string) int {
	j, err := loadJob(path)
	status := guest.StatusCannotRun
	if err == nil {
		signals, stop := signalsTo()
		defer stop()
		status, err = runGuestOnce(&j, signals, j.Last)
	}
	if err != nil && !j.Last && silentReset(err) {
		err = os.WriteFile(filepath.Join(j.Tmp, againFile), nil, 0o600)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "moovm:", printable.Lines(err.Error()))
	}
	return status
}

// confine is the BeforeStart of a job's guest: the process keeps what the guest
// was given, and the job's folders.
func (s *setup) confine(j *job) func(*vmm.Machine) error {
	n := confine.Needs{Read: s.read, Write: append([]string{j.Out, j.Tmp}, s.write...)}
	if j.Keep != "" {
		n.Write = append(n.Write, j.Keep)
	}
	return func(*vmm.Machine) error {
		if _, err := confine.Apply(n); err != nil && !errors.Is(err, confine.ErrUnsupported) {
			return fmt.Errorf("%w; --no-confine, or Config.NoConfine, goes on without", err)
		}
		return nil
	}
}
