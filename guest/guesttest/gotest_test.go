package guesttest

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// go test -exec 'moovm test' on packages that know nothing of it: events,
// outcomes, files and the exit status are go test's own. Two packages run at a
// time; in the sandbox they share the emulated host.
func TestGoTest(t *testing.T) {
	if os.Getenv("MOOVM_QEMU") == "" || os.Getenv("MOOVM_KERNEL") == "" {
		t.Skip("boots guests: set MOOVM_QEMU=1 and MOOVM_KERNEL to a vmlinuz with its modules beside it (`make test` does)")
	}
	dir, err := os.MkdirTemp("/tmp", "moovm-test-") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	moovm := filepath.Join(dir, "moovm")
	build := exec.Command("go", "build", "-o", moovm, "github.com/moovm/moovm/cmd/moovm")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	cover, cpu, data := filepath.Join(dir, "cover.out"), filepath.Join(dir, "a.test"), filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o777); err != nil {
		t.Fatal(err)
	}
	gotest := func(args ...string) (string, error) {
		cmd := exec.Command("go", append([]string{"test", "-count=1", "-exec", moovm + " test"}, args...)...)
		cmd.Dir = "testdata/mod"
		cmd.Env = append(os.Environ(), "TMPDIR="+dir, "GOFLAGS=-mod=mod", "MOOVM_SANDBOX_IDLE=20s")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		t.Logf("go test %s\n%s%s", strings.Join(args, " "), out, stderr.String())
		return string(out), err
	}
	out, err := gotest("-json", "-short", "-shuffle=7", "-bench=.", "-benchtime=3x", "-coverprofile="+cover, "./...")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("go test: %v, want exit status 1", err)
	}
	events, text := map[string]string{}, map[string]string{}
	for line := range strings.Lines(out) {
		var e struct{ Action, Package, Test, Output string }
		if json.Unmarshal([]byte(line), &e) != nil {
			continue
		}
		key := strings.TrimPrefix(e.Package, "example.com/mod/") + " " + e.Test
		switch e.Action {
		case "pass", "fail", "skip", "bench":
			events[key] = e.Action
		case "output":
			text[key] += e.Output
		}
	}
	for key, want := range map[string]string{
		"a TestGuest": "pass", "a TestSign/-": "pass", "a TestSign": "pass", "a TestSkip": "skip", "a FuzzSign/seed#0": "pass", "a ": "pass",
		"b TestFails": "fail", "b ": "fail",
	} {
		if events[key] != want {
			t.Errorf("%q: %q, want %q", key, events[key], want)
		}
	}
	all := strings.Join(slices.Collect(func(yield func(string) bool) {
		for _, s := range text {
			if !yield(s) {
				return
			}
		}
	}), "")
	for _, want := range []string{"short true", "-test.shuffle 7", "fails on purpose", "skipped on purpose", "ns/op", "coverage: 100.0% of statements"} {
		if !strings.Contains(all, want) {
			t.Errorf("the output lacks %q", want)
		}
	}
	if b, err := os.ReadFile(cover); err != nil || !strings.Contains(string(b), "example.com/mod/a/a.go:5.25,6.11 1 ") {
		t.Errorf("the coverage profile: %q, %v", b, err)
	}
	out, err = gotest("-v", "-run=TestGuest|TestSign", "-cpuprofile="+cpu, "-outputdir="+data, "-o="+filepath.Join(dir, "a.test.bin"), "./a")
	if err != nil || !strings.Contains(out, "--- PASS: TestGuest") {
		t.Errorf("go test: %v", err)
	}
	if st, err := os.Stat(cpu); err != nil || st.Size() == 0 {
		t.Errorf("the profile: %v", err)
	}
}
