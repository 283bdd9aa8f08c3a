package guestinit

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/moovm/moovm/guest/control"
	"golang.org/x/sys/unix"
)

// setupLinger is how long the output of a set-up is waited for that has ended,
// but left something running that may write more.
const setupLinger = time.Second

// setup runs the shell lines that come before the command, with its folder and
// environment. What they write goes to stderr, so that the command's output is
// its own. What they leave running stays.
func (in *initProcess) setup(c control.Command, env []string) error {
	for _, line := range in.cfg.Setup {
		if err := runSetup(line, c, env, func(p []byte) { in.line.send(control.FrameStderr, p) }); err != nil {
			return stage(control.FailSetup, err)
		}
	}
	return nil
}

func runSetup(line string, c control.Command, env []string, output func([]byte)) error {
	failed := func(format string, args ...any) error {
		return fmt.Errorf("the set-up %q failed in the guest, nothing else ran: %w", line, fmt.Errorf(format, args...))
	}
	const shell = "/bin/sh"
	if _, err := os.Stat(shell); err != nil {
		return failed("there is no %s; use a root file system that has one", shell)
	}
	p, err := startCommand(control.Command{Args: []string{shell, "-c", line}, Dir: c.Dir, Merge: true}, shell, env, nil)
	if err != nil {
		return failed("%w", errCause(err))
	}
	p.stdin.Close()
	written := make(chan struct{})
	go func() {
		defer close(written)
		defer p.stdout.Close()
		buf := make([]byte, control.SerialFrame)
		for {
			n, err := p.stdout.Read(buf)
			if n > 0 {
				output(buf[:n])
			}
			if err != nil {
				return
			}
		}
	}()
	ws := reap(p.pid)
	select {
	case <-written:
	case <-time.After(setupLinger):
	}
	switch {
	case ws.Signaled():
		return failed("signal %d (%v)", ws.Signal(), ws.Signal())
	case ws.ExitStatus() != 0:
		return failed("exit status %d", ws.ExitStatus())
	}
	return nil
}

// readKernelConfig takes the kernel's configuration file out of the initramfs,
// which is gone when the root file system is entered.
func (in *initProcess) readKernelConfig() (err error) {
	if in.cfg.KernelConfig != "" {
		in.kernelConfig, err = os.ReadFile(control.KernelConfigPath)
	}
	return err
}

// addKernelConfig puts it where programs look for it, unless there is one.
func (in *initProcess) addKernelConfig() {
	path := in.cfg.KernelConfig
	if path == "" {
		return
	}
	if st, err := os.Stat(path); err == nil && st.Size() > 0 {
		return
	}
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, in.kernelConfig, 0o644)
	}
	if err != nil && unix.Access("/", unix.W_OK) == nil { // a read-only root goes without
		in.line.warn(fmt.Sprintf("the kernel's configuration is not at %s: %v", path, errCause(err)))
	}
	in.kernelConfig = nil
}
