package guesttest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestRedirect(t *testing.T) {
	out, dir := t.TempDir(), t.TempDir()
	profile := filepath.Join(t.TempDir(), "abs.prof")
	args := []string{
		"-test.v=test2json", "-test.run", "X", "-test.coverprofile=c.out", "--test.cpuprofile", profile,
		"-test.outputdir=sub", "-test.artifacts", "-test.testlogfile=log", "-test.gocoverdir=cover", "-test.short", "rest", "-test.trace=not-a-flag",
	}
	env := []string{"A=1", "GOCOVERDIR=data"}
	got, gotEnv, o := redirect(args, env, dir, out)
	if slices.Equal(args, got) || args[3] != "-test.coverprofile=c.out" {
		t.Error("the caller's arguments were changed")
	}
	if err := o.prepare(); err != nil {
		t.Fatal(err)
	}
	// Where the guest writes, by what it is told.
	place := map[string]string{}
	for _, a := range append(slices.Clone(got), gotEnv...) {
		name, value, _ := strings.Cut(a, "=")
		place[name] = value
		if strings.HasPrefix(value, dir) || value == profile {
			t.Errorf("%s is still written on the host", a)
		}
	}
	if got[1] != "-test.run=X" || !slices.Contains(got, "-test.v=test2json") || got[len(got)-1] != "-test.trace=not-a-flag" || place["A"] != "1" {
		t.Errorf("%q %q", got, gotEnv)
	}
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	write(place["-test.coverprofile"], "mode: set\na 1\n")
	write(place["-test.cpuprofile"], "cpu")
	meta, counters := "covmeta."+strings.Repeat("a", 32), "covcounters."+strings.Repeat("b", 32)+".1.2"
	write(place["-test.gocoverdir"]+"/"+meta, "meta")
	write(place["GOCOVERDIR"]+"/"+counters, "counters")
	if err := os.MkdirAll(place["-test.outputdir"]+"/_artifacts/x", 0o777); err != nil {
		t.Fatal(err)
	}
	write(place["-test.outputdir"]+"/_artifacts/x/file", "artifact")
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o777); err != nil {
		t.Fatal(err)
	}
	c := newCollector()
	if err := o.collect(c); err != nil {
		t.Fatal(err)
	}
	write(place["-test.coverprofile"], "mode: set\nb 1\n")
	for _, old := range []string{place["GOCOVERDIR"] + "/" + counters, place["-test.outputdir"] + "/_artifacts/x/file"} {
		os.Remove(old)
	}
	if err := o.collect(c); err != nil { // the next kernel's
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"sub/c.out": "mode: set\na 1\nb 1\n", profile: "cpu", "cover/" + meta: "meta", "data/" + counters: "counters", "sub/_artifacts/x/file": "artifact",
	} {
		if b, err := os.ReadFile(join(dir, path)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "log")); err == nil {
		t.Error("a file that was not written appeared")
	}
	if got, _, _ := redirect([]string{"-test.artifacts"}, nil, dir, out); len(got) != 2 || !strings.HasPrefix(got[0], "-test.outputdir="+out) {
		t.Errorf("artifacts: %q", got)
	}
}

// The guest may put anything where the host collects: links lead nowhere.
func TestCollectHostile(t *testing.T) {
	out, dir := t.TempDir(), t.TempDir()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, _, o := redirect([]string{"-test.coverprofile=c.out", "-test.gocoverdir=d"}, nil, dir, out)
	if err := o.prepare(); err != nil {
		t.Fatal(err)
	}
	_, profile, _ := strings.Cut(got[0], "=")
	_, folder, _ := strings.Cut(got[1], "=")
	for _, link := range []string{profile, folder + "/link"} {
		if err := os.Symlink(secret, link); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.collect(newCollector()); err != nil {
		t.Fatal(err)
	}
	os.Remove(folder + "/link")
	os.Remove(folder)
	if err := os.Symlink(filepath.Dir(secret), folder); err != nil {
		t.Fatal(err)
	}
	_ = o.collect(newCollector())
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			t.Errorf("%s was brought back", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestTestTimeout(t *testing.T) {
	for arg, want := range map[string]time.Duration{"-test.timeout=10m0s": 10 * time.Minute, "-test.timeout=0s": 0, "-test.v": 0, "-test.timeout=soon": 0} {
		if got := testTimeout([]string{"-test.v", arg}); got != want {
			t.Errorf("%s: %v", arg, got)
		}
	}
	if got := testTimeout([]string{"--", "-test.timeout=1s"}); got != 0 {
		t.Errorf("an argument of the test: %v", got)
	}
}
