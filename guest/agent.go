package guest

import (
	"os"

	"github.com/moovm/moovm/internal/agent"
)

// agentName is what an init calls itself when it runs as agent.
const agentName = "moovm-agent"

// agentEnv is set for the agent too: a name alone could be anybody's.
const agentEnv = "MOOVM_AGENT"

// AgentCommand is the command that takes any number of commands over its
// stdin and stdout (see internal/agent): the guest's init once more, as a
// process of its own. IsInit and InitMain do the rest. With fresh, the guest
// forgets what it cached of files before each command, for those that change
// on the host.
func AgentCommand(fresh bool) *Command {
	mode := "1"
	if fresh {
		mode = "fresh"
	}
	return &Command{Args: []string{"/proc/self/exe", agentName}, Env: []string{agentEnv + "=" + mode}}
}

func isAgent() bool {
	return len(os.Args) == 2 && os.Args[1] == agentName && os.Getenv(agentEnv) != "" && os.Getpid() != 1
}

func agentMain() {
	var before func()
	if os.Getenv(agentEnv) == "fresh" {
		before = dropCaches
	}
	if err := agent.Serve(os.Stdin, os.Stdout, before); err != nil {
		os.Stderr.WriteString("moovm: " + err.Error() + "\n")
		os.Exit(1)
	}
	os.Exit(0)
}

// dropCaches makes the kernel forget pages, names and attributes of files that
// are not in use (Documentation/admin-guide/sysctl/vm.rst).
func dropCaches() {
	_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

// CommandEnv is the environment of a command in a guest: a plain root login's,
// and what is added or overridden.
func CommandEnv(extra []string) []string { return commandEnv(extra) }
