package guesttest

import (
	"debug/buildinfo"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/moovm/moovm/guest"
)

// MaxDefaultCPUs is the most processors that a guest has when nobody says how
// many. They are the host's; in the sandbox, where more of them are slower than
// one, there is one.
const MaxDefaultCPUs = 4

func defaultCPUs(sandbox bool, host int) int {
	if sandbox {
		return 1
	}
	return min(host, MaxDefaultCPUs)
}

func (c *Config) setCPUs(sandbox bool) {
	if c.CPUs == 0 {
		c.CPUs = defaultCPUs(sandbox, runtime.NumCPU())
	}
}

// cpusHint is what to say when tests failed, with status, in a guest that had
// one processor because it ran in the sandbox: why they may have needed more.
// It is empty when nothing speaks for that.
func cpusHint(status int, binary string, args, env []string) string {
	if status == 0 || status >= guest.StatusTimeout {
		return ""
	}
	why := callsForCPUs(args, env)
	if info, err := buildinfo.ReadFile(binary); err == nil && why == "" {
		for _, s := range info.Settings {
			if s.Key == "-race" && s.Value == "true" {
				why = "they were built with -race, which finds more with several"
			}
		}
	}
	if why == "" {
		return ""
	}
	return fmt.Sprintf("the tests had one processor, which is the default in the sandbox, and %s; try --cpus 2 (Config.CPUs)", why)
}

// callsForCPUs says how arguments or environment ask for several processors.
func callsForCPUs(args, env []string) string {
	if list, ok := flagValue(args, "cpu"); ok {
		for s := range strings.SplitSeq(list, ",") {
			if n, err := strconv.Atoi(strings.TrimSpace(s)); err == nil && n > 1 {
				return "-test.cpu=" + list + " calls for more"
			}
		}
	}
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "GOMAXPROCS="); ok {
			if n, err := strconv.Atoi(v); err == nil && n > 1 {
				return e + " calls for more"
			}
		}
	}
	return ""
}

// sayCPUs gives the hint for a run in the sandbox, if there is one.
func (r *runner) sayCPUs(status int) {
	if !r.place.Sandbox || !r.defaultCPUs || r.job.Config.Quiet {
		return
	}
	if hint := cpusHint(status, r.job.Binary, r.job.Args, append(r.job.Env, r.job.Config.Env...)); hint != "" {
		fmt.Fprintln(os.Stderr, "moovm:", hint)
	}
}
