package guesttest

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestDefaultCPUs(t *testing.T) {
	for _, c := range []struct {
		sandbox    bool
		host, want int
	}{{false, 1, 1}, {false, 2, 2}, {false, 4, 4}, {false, 64, 4}, {true, 64, 1}, {true, 1, 1}} {
		if got := defaultCPUs(c.sandbox, c.host); got != c.want {
			t.Errorf("%+v: %d", c, got)
		}
	}
	own := Config{CPUs: 7}
	own.setCPUs(true)
	if own.CPUs != 7 {
		t.Errorf("what was asked for became %d", own.CPUs)
	}
	if err := own.setDefaults(); err == nil && own.CPUs != 7 {
		t.Errorf("what was asked for became %d", own.CPUs)
	}
}

func TestCPUsHint(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module example.com/race\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "main.go"), []byte("package main\n\nfunc main() {}\n"), 0o666); err != nil {
		t.Fatal(err)
	}
	race := filepath.Join(dir, "race")
	cmd := exec.Command("go", "build", "-race", "-o", race, ".")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOFLAGS=", "GOWORK=off", "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Logf("no race detector here, so its part is not tested (it needs go and a C compiler): %v\n%s", err, out)
		race = ""
	}
	plain, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		status    int
		binary    string
		args, env []string
		want      string // part of it; empty = no hint
	}{
		{1, plain, []string{"-test.cpu=1,2"}, nil, "-test.cpu=1,2 calls for more"},
		{1, plain, nil, []string{"GOMAXPROCS=3"}, "GOMAXPROCS=3 calls for more"},
		{1, race, nil, nil, "built with -race"},
		{66, race, nil, nil, "built with -race"},
		{0, race, []string{"-test.cpu=2"}, nil, ""},
		{124, race, []string{"-test.cpu=2"}, nil, ""},
		{125, race, []string{"-test.cpu=2"}, nil, ""},
		{1, filepath.Join(dir, "main.go"), []string{"-test.cpu=1"}, []string{"GOMAXPROCS=1", "X=2"}, ""},
		{1, filepath.Join(dir, "main.go"), []string{"-test.cpu=x"}, nil, ""},
	} {
		if c.binary == "" {
			continue
		}
		hint := cpusHint(c.status, c.binary, c.args, c.env)
		if (hint == "") != (c.want == "") || !strings.Contains(hint, c.want) || hint != "" && !strings.Contains(hint, "--cpus") {
			t.Errorf("%+v: %q", c, hint)
		}
	}
}
