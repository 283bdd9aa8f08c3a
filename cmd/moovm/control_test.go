package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/ctl"
	"github.com/moovm/moovm/internal/confine"
)

func TestParseControl(t *testing.T) {
	for text, want := range map[string]controlFlag{
		"":                        {},
		"unix:s":                  {socket: "s"},
		"unix:/run/a,,b,dir=/x,,": {socket: "/run/a,b", dir: "/x,"},
	} {
		if got, err := parseControl(text); err != nil || got != want {
			t.Errorf("%q is %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"s", "unix:", "tcp:1", "unix:s,", "unix:s,dir=", "unix:s,ro", "unix:s,dir=a,dir=b"} {
		if got, err := parseControl(text); err == nil || !strings.Contains(err.Error(), "--control") {
			t.Errorf("%q is %+v, %v", text, got, err)
		}
	}
}

// Overlays are made below the folder that was named, whatever the links.
func TestControlPlace(t *testing.T) {
	dir, err := absPath(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	for _, d := range []string{in, out, filepath.Join(in, "deep")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Symlink(out, filepath.Join(in, "link")), os.Symlink(in, filepath.Join(out, "back"))); err != nil {
		t.Fatal(err)
	}
	c := &controlled{dir: in}
	for path, want := range map[string]string{
		"a.cow": in + "/a.cow", "deep/a.cow": in + "/deep/a.cow", in + "/a.cow": in + "/a.cow",
		out + "/back/a.cow": in + "/a.cow", "../in/a.cow": in + "/a.cow",
	} {
		if got, err := c.place(path); err != nil || got != want {
			t.Errorf("%s is made at %q, %v; want %q", path, got, err, want)
		}
	}
	for _, path := range []string{"../a.cow", "link/a.cow", out + "/a.cow", "/a.cow", "deep/../../a.cow", in + "-more/a.cow"} {
		if got, err := c.place(path); !errors.Is(err, ctl.ErrNotAllowed) && !errors.Is(err, ctl.ErrRequest) {
			t.Errorf("%s is made at %q, %v", path, got, err)
		}
	}
	if _, err := (&controlled{}).place("a.cow"); !errors.Is(err, ctl.ErrNotAllowed) || !strings.Contains(err.Error(), "dir=") {
		t.Errorf("no folder: %v", err)
	}
}

// A process that is confined can still freeze a disk, and only below its folder.
func TestSnapshotConfined(t *testing.T) {
	if dir := os.Getenv("MOOVM_TEST_SNAPSHOT_DIR"); dir != "" {
		snapshotConfined(t, dir)
		return
	}
	dir, err := absPath(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"in", "out"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "base"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := cowdisk.Create(filepath.Join(dir, "in", "0.cow"), cowdisk.CreateOptions{Backing: "../base"}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestSnapshotConfined$", "-test.v")
	cmd.Env = append(os.Environ(), "MOOVM_TEST_SNAPSHOT_DIR="+dir)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if _, why, ok := strings.Cut(string(out), "cannot: "); ok {
		t.Skip(why)
	}
	d, err := cowdisk.Open(filepath.Join(dir, "in", "1.cow"), cowdisk.Options{ReadOnly: true, BackingRoots: []string{dir}})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got := make([]byte, 8)
	if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, []byte("onetwo\x00\x00")) {
		t.Errorf("the new overlay has %q, %v", got, err)
	}
	if st, err := os.Stat(filepath.Join(dir, "in", "1.cow")); err != nil || st.Mode().Perm()&0o022 != 0 {
		t.Errorf("the new overlay's mode is %v, %v", st.Mode(), err)
	}
}

// snapshotConfined is the child of TestSnapshotConfined.
func snapshotConfined(t *testing.T, dir string) {
	d, err := cowdisk.Open(filepath.Join(dir, "in", "0.cow"), cowdisk.Options{BackingRoots: []string{dir}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := confine.Apply(confine.Needs{Images: []string{filepath.Join(dir, "in")}})
	if errors.Is(err, confine.ErrUnsupported) {
		fmt.Println("cannot: needs a kernel with Landlock or seccomp")
		os.Exit(0)
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt([]byte("one"), 0); err != nil {
		t.Error(err)
	}
	if err := d.Snapshot(filepath.Join(dir, "out", "1.cow")); r.Landlock > 0 && err == nil {
		t.Error("an overlay was made outside of the folder")
	} else if r.Landlock == 0 {
		fmt.Println("cannot: needs a kernel with Landlock")
		os.Exit(0)
	}
	if err := d.Snapshot(filepath.Join(dir, "in", "1.cow")); err != nil {
		t.Error(err)
	}
	if _, err := d.WriteAt([]byte("two"), 3); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if !t.Failed() {
		os.Exit(0) // the tests' own cleaning up is not allowed any more
	}
}
