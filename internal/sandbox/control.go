package sandbox

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"

	"github.com/moovm/moovm/guest/control"
)

const (
	// grace is how long a command may take to end after its context did.
	grace = 10 * time.Second
	// lastGrace is how long it may take after a second signal, and how long its
	// last output waits for being taken.
	lastGrace = 3 * time.Second
	// nudgeEvery is how often the emulated host gets an interrupt from outside.
	// QEMU 7.2 may lose its timer's: VMRUN and VMEXIT change the processor's
	// pending interrupts beside the thread that raises them. Any later one
	// brings the lost one along.
	nudgeEvery = 100 * time.Millisecond
	// bootTimeout is how long the emulated host may take to reach its init;
	// it takes seconds, on a busy machine tens of seconds.
	bootTimeout = 3 * time.Minute
)

var errNotTaken = errors.New("its output was not taken")

var errBoot = errors.New("its kernel did not reach user space in " + bootTimeout.String())

// relay serves the control line until the emulated host is gone. When ctx
// ends, the command is told by a signal; if that does not help within the grace
// period, or the host does not come up, giveUp is called.
func relay(ctx context.Context, c *Config, line *os.File, giveUp context.CancelCauseFunc) (control.State, error) {
	ctl := control.NewHost(line, line, control.HostConfig{
		Stdin:     c.Stdin,
		Stdout:    c.Stdout,
		Stderr:    c.Stderr,
		OnStart:   c.OnStart,
		OnWarning: func(text string) { c.Logger.Warn("sandbox: " + text) },
	})
	done := make(chan error, 1)
	go func() { done <- ctl.Run() }()
	r := &relayed{c: c, ctl: ctl, giveUp: giveUp}

	booting := time.NewTimer(bootTimeout)
	defer booting.Stop()
	nudge := time.NewTicker(nudgeEvery)
	defer nudge.Stop()
	ended := ctx.Done()
	for {
		select {
		case err := <-done:
			return ctl.State(), err
		case <-r.lost:
			return ctl.State(), errNotTaken
		case size := <-c.WindowSizes:
			// The line may be gone already; then done says so.
			_ = ctl.Resize(size.Rows, size.Columns)
		case s := <-c.Signals:
			r.signal(s)
		case <-nudge.C:
			if ctl.State().Started {
				_ = ctl.Signal(0) // asks whether the command exists, no more
			}
		case <-booting.C:
			if !ctl.State().Hello {
				r.end(errBoot)
			}
		case <-ended:
			ended = nil
			r.contextEnded(context.Cause(ctx))
		case <-r.tooLong:
			r.end(r.why)
		}
	}
}

// relayed is what relay knows of how its command is to end.
type relayed struct {
	c      *Config
	ctl    *control.Host
	giveUp context.CancelCauseFunc

	signals int              // that came
	tooLong <-chan time.Time // the end of the command's time to end, for why
	why     error
	lost    <-chan time.Time // the end of the time for its output to be taken
}

// end ends the emulated host.
func (r *relayed) end(cause error) {
	r.giveUp(cause)
	r.tooLong = nil
	if r.lost == nil {
		r.lost = time.After(lastGrace)
	}
}

// endIn ends it if the command has not ended before.
func (r *relayed) endIn(d time.Duration, cause error) {
	r.tooLong, r.why = time.After(d), cause
}

func (r *relayed) signal(s os.Signal) {
	n, ok := s.(syscall.Signal)
	if !ok {
		return
	}
	r.signals++
	if !r.ctl.State().Started || r.signals > 2 {
		r.end(&InterruptedError{n})
		return
	}
	_ = r.ctl.Signal(int(n))
	if r.signals == 2 {
		r.endIn(lastGrace, &InterruptedError{n})
	}
}

func (r *relayed) contextEnded(cause error) {
	if !r.ctl.State().Started {
		r.end(cause)
		return
	}
	_ = r.ctl.Signal(int(r.c.EndSignal(cause)))
	r.endIn(grace, cause)
}
