package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/moovm/moovm/cowdisk"
)

func TestParseDisk(t *testing.T) {
	for s, want := range map[string]diskFlag{
		"root.cow":                         {path: "root.cow"},
		"a,,b.cow,ro":                      {path: "a,b.cow", readOnly: true},
		"x,serial=root,format=raw":         {path: "x", serial: "root", format: "raw"},
		"x,serial=01234567890123456789,ro": {path: "x", serial: "01234567890123456789", readOnly: true},
		"x,format=cow":                     {path: "x", format: "cow"},
	} {
		if got, err := parseDisk(s); err != nil || got != want {
			t.Errorf("parseDisk(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{"", ",ro", "x,colour=red", "x,serial=", "x,serial=012345678901234567890", "x,format=qcow2", "x,"} {
		if got, err := parseDisk(s); err == nil {
			t.Errorf("parseDisk(%q) = %+v; want an error", s, got)
		}
	}
}

func TestEphemeral(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	base := filepath.Join(t.TempDir(), "base.img")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o666); err != nil {
		t.Fatal(err)
	}
	d, err := openEphemeral(base, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if left, _ := os.ReadDir(tmp); len(left) != 0 {
		t.Errorf("%s is there while the disk is in use", left[0].Name())
	}
	if _, err := d.WriteAt([]byte("hello"), 4096); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := d.ReadAt(got, 4096); err != nil || string(got) != "hello" {
		t.Errorf("read %q, %v", got, err)
	}
	if b, err := os.ReadFile(base); err != nil || string(b[4096:4101]) == "hello" {
		t.Errorf("the base was written: %v", err)
	}
}
