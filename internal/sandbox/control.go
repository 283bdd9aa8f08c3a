package sandbox

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"

	"github.com/moovm/moovm/guest"
)

const (
	// grace is how long a command may take to end after its context did.
	grace = 10 * time.Second
	// nudgeEvery is how often the emulated host gets an interrupt from outside.
	// QEMU 7.2 may lose its timer's: VMRUN and VMEXIT change the processor's
	// pending interrupts beside the thread that raises them. Any later one
	// brings the lost one along.
	nudgeEvery = 100 * time.Millisecond
	// bootTimeout is how long the emulated host may take to reach its init;
	// it takes seconds, on a busy machine tens of seconds.
	bootTimeout = 3 * time.Minute
)

var errBoot = errors.New("its kernel did not reach user space in " + bootTimeout.String())

// relay serves the control line until the emulated host is gone. When ctx
// ends, the command is told by SIGINT; if that does not help within the grace
// period, or the host does not come up, giveUp is called.
func relay(ctx context.Context, c *Config, line *os.File, giveUp context.CancelCauseFunc) (guest.ControlState, error) {
	ctl := guest.NewControl(line, line, guest.ControlConfig{
		Stdin:     c.Stdin,
		Stdout:    c.Stdout,
		Stderr:    c.Stderr,
		OnStart:   c.OnStart,
		OnWarning: func(text string) { c.Logger.Warn("sandbox: " + text) },
	})
	done := make(chan error, 1)
	go func() { done <- ctl.Run() }()

	booting := time.NewTimer(bootTimeout)
	defer booting.Stop()
	nudge := time.NewTicker(nudgeEvery)
	defer nudge.Stop()
	ended := ctx.Done()
	var tooLong <-chan time.Time
	for {
		select {
		case err := <-done:
			return ctl.State(), err
		case size := <-c.WindowSizes:
			// The line may be gone already; then done says so.
			_ = ctl.Resize(size.Rows, size.Columns)
		case s := <-c.Signals:
			if n, ok := s.(syscall.Signal); ok {
				_ = ctl.Signal(int(n))
			}
		case <-nudge.C:
			if ctl.State().Started {
				_ = ctl.Signal(0) // asks whether the command exists, no more
			}
		case <-booting.C:
			if !ctl.State().Hello {
				giveUp(errBoot)
			}
		case <-ended:
			ended = nil
			if !ctl.State().Started {
				giveUp(context.Cause(ctx))
				continue
			}
			_ = ctl.Signal(int(syscall.SIGINT))
			tooLong = time.After(grace)
		case <-tooLong:
			giveUp(context.Cause(ctx))
		}
	}
}
