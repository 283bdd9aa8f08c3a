package main

import (
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// progress shows how far a long job is, if standard error is a terminal. The
// returned functions report and end; both are nil-safe to call.
func progress(g *globals, what string) (report func(done, total int64), end func()) {
	if g.quiet || !term.IsTerminal(int(os.Stderr.Fd())) {
		return nil, func() {}
	}
	bar := progressbar.NewOptions64(-1,
		progressbar.OptionSetDescription(what),
		progressbar.OptionSetWriter(os.Stderr),
		progressbar.OptionShowBytes(true),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionSetWidth(30),
		// Its goroutine looks at the bar without the bar's lock.
		progressbar.OptionSetSpinnerChangeInterval(0),
		progressbar.OptionClearOnFinish(),
	)
	report = func(done, total int64) {
		bar.ChangeMax64(total)
		bar.Set64(done)
	}
	return report, func() { bar.Finish() }
}
