package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moovm/moovm/cowdisk"
)

func TestParseDisk(t *testing.T) {
	for s, want := range map[string]diskFlag{
		"root.cow":                         {path: "root.cow"},
		"a,,b.cow,ro":                      {path: "a,b.cow", readOnly: true},
		"x,serial=root,format=raw":         {path: "x", serial: "root", format: cowdisk.FormatRaw},
		"x,serial=01234567890123456789,ro": {path: "x", serial: "01234567890123456789", readOnly: true},
		"x,format=cow":                     {path: "x", format: cowdisk.FormatCOW},
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

// A guest wrote the header of an image on a neighbour into its raw disk, with the mark that an image would have: whoever opens disks
// follows it only if the user says that it is an image, by format=cow or by the name.
func TestForgedDisk(t *testing.T) {
	dir := t.TempDir()
	secret, guest, named := filepath.Join(dir, "secret"), filepath.Join(dir, "guest.img"), filepath.Join(dir, "guest.cow")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("secret!\n"), 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	over := filepath.Join(dir, "over")
	if err := cowdisk.Create(over, cowdisk.CreateOptions{Backing: "secret"}); err != nil {
		t.Fatal(err)
	}
	header, err := os.ReadFile(over)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{guest, named} {
		raw := make([]byte, 1<<20)
		copy(raw, header)
		if err := os.WriteFile(name, raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	open := map[string]func(word string) (*cowdisk.Disk, error){
		"disk": func(word string) (*cowdisk.Disk, error) {
			f, err := parseDisk(word)
			if err != nil {
				t.Fatal(err)
			}
			return f.open(cowdisk.Options{})
		},
		"base": func(word string) (*cowdisk.Disk, error) { return openEphemeral(word, cowdisk.Options{}) },
	}
	for what, open := range open {
		for word, reads := range map[string]string{guest: "", guest + ",format=raw": "OOOM", guest + ",format=cow": "secr", named: "secr"} {
			d, err := open(word)
			if reads == "" {
				if !errors.Is(err, cowdisk.ErrFormat) {
					t.Errorf("%s %s: %v", what, word, err)
				}
				continue
			}
			if err != nil {
				t.Fatalf("%s %s: %v", what, word, err)
			}
			b := make([]byte, 4)
			if _, err := d.ReadAt(b, 0); err != nil || string(b) != reads {
				t.Errorf("%s %s reads %q, %v", what, word, b, err)
			}
			d.Close()
		}
	}
}

// A file that is not said to be raw is not written to as if it were.
func TestRawDiskIsNamed(t *testing.T) {
	name := filepath.Join(t.TempDir(), "a,b.img")
	if err := os.WriteFile(name, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (diskFlag{path: name}).open(cowdisk.Options{}); !errors.Is(err, cowdisk.ErrNotCOW) || !strings.Contains(err.Error(), "a,,b.img,format=raw") {
		t.Error(err)
	}
	d, err := diskFlag{path: name, format: cowdisk.FormatRaw}.open(cowdisk.Options{}) // and nothing holds its lock
	if err != nil {
		t.Fatal(err)
	}
	d.Close()
}
