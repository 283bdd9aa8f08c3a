package guest

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/moovm/moovm/guest/control"
)

// A dynamic program takes its loader and libraries along, a static one nothing.
func TestLibraryFiles(t *testing.T) {
	const program = "/bin/sh"
	if err := checkStatic(program); !errors.Is(err, ErrNotStatic) {
		t.Skipf("%s is no dynamic program here (%v)", program, err)
	}
	var names []string
	a := Initramfs{Init: program, Libraries: true}
	var b bytes.Buffer
	if _, err := a.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	r := cpio.NewReader(&b)
	for {
		h, err := r.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
	}
	loader := slices.IndexFunc(names, func(n string) bool { return strings.Contains(n, "/ld-") })
	libc := slices.IndexFunc(names, func(n string) bool { return strings.Contains(n, "libc.") || strings.Contains(n, "libc-") })
	if loader < 0 || libc < 0 {
		t.Errorf("no loader or no C library in %q", names)
	}
	if _, err := (&Initramfs{Init: program}).Bytes(); !errors.Is(err, ErrNotStatic) {
		t.Errorf("without Libraries: %v", err)
	}
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o777); err != nil {
		t.Fatal(err)
	}
	if files, err := LibraryFiles(script); files != nil || err != nil {
		t.Errorf("a script: %v, %v", files, err)
	}
}

// What a test harness needs of the plan: a root of its own, mounts before
// shares, overlaid shares.
func TestPlanRootAndMounts(t *testing.T) {
	cfg := Config{
		NoTree: true, Command: &control.Command{Args: []string{"x"}}, Disks: []Disk{{}},
		Root:   &control.Root{Device: "host", Type: "9p", ReadOnly: true, Overlay: true},
		Mounts: []control.Mount{{Source: "tmpfs", Target: "/tmp", Type: "tmpfs"}},
		Shares: []Share{{Tag: "host"}, {Tag: "pkg", Target: "/src", Overlay: true, Options: "cache=loose"}},
	}
	c := initConfigFor(&cfg, bootParams{})
	if c.Root == nil || *c.Root != *cfg.Root {
		t.Errorf("root %+v", c.Root)
	}
	want := []control.Mount{cfg.Mounts[0], {Source: "pkg", Target: "/src", Type: "9p", Options: shareOptions + ",cache=loose,ro", Overlay: true}}
	if !slices.Equal(c.Mounts, want) {
		t.Errorf("mounts %+v", c.Mounts)
	}
	cfg.NoRoot = true
	if c := initConfigFor(&cfg, bootParams{}); c.Root != nil {
		t.Errorf("a root all the same: %+v", c.Root)
	}
}
