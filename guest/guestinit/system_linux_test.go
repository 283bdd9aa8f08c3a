package guestinit

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moovm/moovm/kmod"
)

func TestHostname(t *testing.T) {
	for text, want := range map[string]string{
		"": "localhost", "moovm": "moovm", "# a comment\n\n web-1.example \nother": "web-1.example",
		"two words": "localhost", "a/b": "localhost", "esc\x1b": "localhost", strings.Repeat("x", 65): "localhost",
	} {
		if got := hostnameOf(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestMachineID(t *testing.T) {
	dir := t.TempDir()
	path, over := filepath.Join(dir, "machine-id"), filepath.Join(dir, "over")
	read := func() string {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	for _, before := range []string{"", "uninitialized\n"} {
		writeFile(t, path, []byte(before))
		giveMachineID(path, over, true)
		if id := read(); len(id) != 33 || strings.Trim(id, "0123456789abcdef\n") != "" || id[12] != '4' {
			t.Errorf("%q became %q", before, id)
		}
	}
	id := read()
	giveMachineID(path, over, true)
	if read() != id {
		t.Error("another machine-id the second time")
	}
	if _, err := os.Stat(over); err == nil {
		t.Error("a scratch file system has its own file")
	}
}

func TestControllers(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "cgroup.controllers"), []byte("cpu memory pids\n"))
	writeFile(t, filepath.Join(dir, "cgroup.subtree_control"), nil)
	enableControllers(dir)
	if b, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control")); err != nil || string(b) != "+pids" {
		t.Errorf("the last one written is %q, %v", b, err)
	}
	enableControllers(t.TempDir()) // no such group: nothing happens
}

func TestMakeStaticNodes(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to make device nodes")
	}
	dev := t.TempDir()
	writeFile(t, filepath.Join(dev, "there"), []byte("kept"))
	makeStaticNodes(dev, []kmod.StaticNode{
		{Name: "fuse", Major: 10, Minor: 229}, {Name: "net/tun", Major: 10, Minor: 200}, {Name: "fd0", Block: true, Major: 2}, {Name: "there", Major: 1},
	})
	for name, want := range map[string]os.FileMode{
		"fuse": os.ModeDevice | os.ModeCharDevice | 0o666, "net/tun": os.ModeDevice | os.ModeCharDevice | 0o666, "fd0": os.ModeDevice | 0o600, "there": 0o644,
	} {
		st, err := os.Lstat(filepath.Join(dev, name))
		if err != nil && name != "there" {
			t.Skipf("needs to make device nodes: %v", err)
		}
		if err != nil || st.Mode() != want {
			t.Errorf("%s: %v, want %v, %v", name, st.Mode(), want, err)
		}
	}
}

func TestIsModprobe(t *testing.T) {
	args := os.Args
	defer func() { os.Args = args }()
	for line, want := range map[string]bool{
		modprobeName + " -q -- fs-xfs": true, modprobeName + " -q --": false, "modprobe -q -- fs-xfs": false, modprobeName + " -v -- fs-xfs": false,
	} {
		os.Args = strings.Fields(line)
		if isModprobe() != want {
			t.Errorf("%q: %v", line, !want)
		}
	}
}
