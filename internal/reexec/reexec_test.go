package reexec

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

var speaker = Role{Name: "speaker", Main: func(argument string) int {
	fmt.Printf("%s; set: %q\n", argument, os.Getenv(env))
	return 7
}}

func TestMain(m *testing.M) {
	Do(speaker)
	os.Exit(m.Run())
}

func TestDo(t *testing.T) {
	self, err := Path()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, env, says string
		status          int
	}{
		{"a role, which its children do not have", speaker.Env("a=b c"), "a=b c; set: \"\"\n", 7},
		{"bytes", speaker.Env("\x80\xff"), "\x80\xff; set: \"\"\n", 7},
		{"without an argument", speaker.Env(""), "; set: \"\"\n", 7},
		{"a role of another program", Role{Name: "dancer"}.Env(""), `started as "dancer"`, StatusUnknown},
		{"set by hand", env + "=", `started as ""`, StatusUnknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := exec.Command(self, "-test.run=^$")
			cmd.Env = append(os.Environ(), c.env)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != c.status || !strings.Contains(string(out), c.says) {
				t.Errorf("%v: %q; want status %d and %q", err, out, c.status, c.says)
			}
		})
	}
}

func TestNoRole(t *testing.T) { Do(speaker) } // returns
