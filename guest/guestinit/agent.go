package guestinit

import (
	"os"

	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/internal/agent"
)

// agentName is what an init calls itself when it runs as agent.
const agentName = "moovm-agent"

// agentEnv is set for the agent too: a name alone could be anybody's.
const agentEnv = "MOOVM_AGENT"

// AgentCommand is the command that takes any number of commands over its
// stdin and stdout (see internal/agent): the guest's init once more, as a
// process of its own. IsInit and Main do the rest. With fresh, the guest
// forgets what it cached of files before each command, and writes what it
// holds of them after it: for file systems that the host uses too.
func AgentCommand(fresh bool) *control.Command {
	mode := "1"
	if fresh {
		mode = "fresh"
	}
	return &control.Command{Args: []string{"/proc/self/exe", agentName}, Env: []string{agentEnv + "=" + mode}}
}

func isAgent() bool {
	return len(os.Args) == 2 && os.Args[1] == agentName && os.Getenv(agentEnv) != "" && os.Getpid() != 1
}

func agentMain() {
	// What is on the disks of a clone is as whole as it can be without the pages
	// that only memory has.
	hooks := agent.Hooks{Hold: syncFiles, Go: takeIdentity}
	if os.Getenv(agentEnv) == "fresh" {
		hooks.Before, hooks.After = dropCaches, syncFiles
	}
	if err := agent.Serve(os.Stdin, os.Stdout, hooks); err != nil {
		os.Stderr.WriteString("moovm: " + err.Error() + "\n")
		os.Exit(1)
	}
	os.Exit(0)
}

// CommandEnv is the environment of a command in a guest: a plain root login's,
// and what is added or overridden.
func CommandEnv(extra []string) []string { return commandEnv(extra) }
