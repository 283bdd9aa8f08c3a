package main

import (
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"moovm": main})
}

// TestScripts runs testdata/script/*.txtar: the program as its users see it.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		// UPDATE=1 writes what the program says now into the scripts' files.
		UpdateScripts: os.Getenv("UPDATE") != "",
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"status":   cmdStatus,
			"patch":    cmdPatch,
			"truncate": cmdTruncate,
			"full":     cmdFull,
		},
		Setup: func(env *testscript.Env) error {
			// Nothing of this machine: no kernel is found unless a script names one.
			env.Setenv("MOOVM_CACHE", env.WorkDir+"/cache")
			env.Setenv("MOOVM_KERNEL", "")
			env.Setenv("HOME", env.WorkDir)
			return nil
		},
	})
}

// status N PROGRAM ARG…: the program ends with exit status N.
func cmdStatus(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: status N PROGRAM ARG…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit status %d, want %d", got, want)
	}
}

// patch FILE OFFSET HEX: writes bytes into a file.
func cmdPatch(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 3 {
		ts.Fatalf("usage: patch FILE OFFSET HEX")
	}
	off, err := strconv.ParseInt(args[1], 0, 64)
	ts.Check(err)
	data, err := hex.DecodeString(args[2])
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_WRONLY|os.O_CREATE, 0o666)
	ts.Check(err)
	defer f.Close()
	_, err = f.WriteAt(data, off)
	ts.Check(err)
}

// truncate SIZE FILE: makes a file that long.
func cmdTruncate(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: truncate SIZE FILE")
	}
	size, err := parseSize(args[0])
	ts.Check(err)
	name := ts.MkAbs(args[1])
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE, 0o666)
	ts.Check(err)
	defer f.Close()
	ts.Check(f.Truncate(size))
}

// full PROGRAM ARG…: the program fails, because its output goes to a full device,
// and says so.
func cmdFull(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) == 0 {
		ts.Fatalf("usage: full PROGRAM ARG…")
	}
	err := ts.Exec("sh", append([]string{"-c", `"$@" >/dev/full`, "sh"}, args...)...)
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		ts.Fatalf("%v with a full output: %v; want exit status 1", args, err)
	}
	if said := ts.ReadFile("stderr"); !strings.Contains(said, "no space left") {
		ts.Fatalf("%v with a full output says %q", args, said)
	}
}
