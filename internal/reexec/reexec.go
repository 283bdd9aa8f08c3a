// Package reexec lets one program play several parts. It starts its own file
// again with a variable that names a role; the first thing in main is Do, which
// plays the role and never comes back.
//
//	func main() {
//		reexec.Do(server, worker)
//		…
//
// Roles are a list of the caller's: nothing is registered behind its back.
package reexec

import (
	"fmt"
	"io"
	"os"
	"strings"
)

// env names the role, and what it is told, of a process that was started by
// this package.
const env = "MOOVM_ROLE"

// StatusUnknown is the exit status of a program that was asked for a role that
// it does not know: the files of two versions were mixed.
const StatusUnknown = 125

// A Role is something the program does when it started itself for that.
type Role struct {
	// Name is a word without "=".
	Name string
	// Main does it and returns the exit status. What the starter gave to Env
	// is its argument.
	Main func(argument string) int
}

// Path is the file of the running program.
func Path() (string, error) {
	path, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("cannot find this program's own file, to start it once more: %w", err)
	}
	return path, nil
}

// Env is the environment variable with which this program plays the role. The
// argument is a few kilobytes at most, without zero bytes.
func (r Role) Env(argument string) string { return env + "=" + r.Name + "=" + argument }

// Do plays the role this process was started in, if any, and then ends the
// process. The processes it starts are free of it.
func Do(roles ...Role) {
	asked, ok := os.LookupEnv(env)
	if !ok {
		return
	}
	os.Unsetenv(env)
	os.Exit(play(asked, roles, os.Stderr))
}

func play(asked string, roles []Role, complain io.Writer) int {
	name, argument, _ := strings.Cut(asked, "=")
	for _, r := range roles {
		if r.Name == name {
			return r.Main(argument)
		}
	}
	fmt.Fprintf(complain, "moovm: this program was started as %q, which it cannot be: $%s is set by another version, or by hand; unset it\n", name, env)
	return StatusUnknown
}
