package guestinit

import (
	"os"
	"strings"

	"github.com/moovm/moovm/guest/control"
)

// IsInit says whether this process is the init of a moovm guest: PID 1, with a
// configuration at ConfigPath; or the agent that the init started from its own
// file, or what the kernel starts from there to load a module. Programs that boot guests with themselves as init call it first thing
// in main.
func IsInit() bool {
	if os.Getpid() != 1 {
		return isAgent() || isModprobe()
	}
	_, err := os.Stat(control.ConfigPath)
	return err == nil
}

// modprobeName is what an init is called by when the kernel runs it as modprobe.
const modprobeName = "/run/moovm-modprobe"

// isModprobe says whether the kernel runs this process to load the module that
// is its last argument.
func isModprobe() bool {
	return len(os.Args) == 4 && os.Args[0] == modprobeName && os.Args[1] == "-q" && os.Args[2] == "--"
}

// defaultPath is the PATH of a command in the guest.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// commandEnv is the environment of the command: a plain root login's, and what
// the configuration adds or overrides.
func commandEnv(extra []string) []string {
	env := []string{"PATH=" + defaultPath, "HOME=/root", "USER=root", "LOGNAME=root", "TERM=linux"}
	for _, e := range extra {
		key, _, _ := strings.Cut(e, "=")
		replaced := false
		for i := range env {
			if strings.HasPrefix(env[i], key+"=") {
				env[i], replaced = e, true
			}
		}
		if !replaced {
			env = append(env, e)
		}
	}
	return env
}

// envValue returns the value of a variable in env.
func envValue(env []string, key string) string {
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, key+"="); ok {
			return v
		}
	}
	return ""
}

// moduleParams collects a module's parameters from the kernel command line
// (name.param=value), which only built-in modules get from the kernel itself.
func moduleParams(cmdline, module string) string {
	var params []string
	for w := range control.SplitCmdline(cmdline) {
		if name, rest, ok := strings.Cut(w, "."); ok && strings.ReplaceAll(name, "-", "_") == module && !strings.ContainsAny(name, "=") {
			params = append(params, rest)
		}
	}
	return strings.Join(params, " ")
}
