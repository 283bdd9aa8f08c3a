package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/moovm/moovm/internal/bytejson"
)

// Whatever an image or a name holds, a terminal only shows it, and JSON keeps it.
func TestHostileNames(t *testing.T) {
	const evil = "\x1b]0;owned\x07 \xff\u202e"
	dir := t.TempDir()
	write := func(name string, size int64) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o666); err != nil {
			t.Skipf("the file system takes UTF-8 names only: %v; set TMPDIR to a folder on another", err)
		}
		if err := os.Truncate(filepath.Join(dir, name), size); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) (stdout []byte) {
		t.Helper()
		cmd := exec.Command("moovm", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "MOOVM_KERNEL=/boot/"+evil, "MOOVM_CACHE="+dir, "MOOVM_BACKING_ROOTS=/"+evil)
		var errs strings.Builder
		cmd.Stderr = &errs
		out, _ := cmd.Output() // some fail: that is what they are here for
		if cmd.ProcessState == nil {
			t.Fatalf("%q did not run", args)
		}
		for _, text := range []string{string(out), errs.String()} {
			bad := strings.IndexFunc(text, func(r rune) bool {
				return r != '\n' && r != '\t' && !unicode.IsPrint(r)
			})
			if bad >= 0 || !utf8.ValidString(text) {
				t.Errorf("%q prints %q", args, text)
			}
		}
		return out
	}
	base := evil + ".img"
	write(base, 1<<20)
	over := evil + ".cow"
	run("create", "-b", base, over)
	run("create", "-s", "1M", evil+"2.cow")
	for _, args := range [][]string{
		{"info", over}, {"info", "--chain", over}, {"map", over}, {"check", over}, {"compare", over, base}, {"compare", over, evil + "2.cow"},
		{"resize", evil + "2.cow", "2M"}, {"doctor"}, {"info", evil}, {"run", "--disk", evil, "--base", evil}, {"run", "--" + evil},
		{"test", "--share", evil, "x"}, {evil}, {"serve", "vhost-user", evil}, {"rebase", "-b", evil, over}, {"commit", evil},
	} {
		run(args...)
	}
	var info struct {
		Filename string `json:"filename"`
		Backing  string `json:"backing-filename"`
	}
	if err := bytejson.Unmarshal(run("info", "--json", over), &info); err != nil || filepath.Base(info.Filename) != over || info.Backing != base {
		t.Errorf("%+v, %v", info, err)
	}
	var extents []struct {
		Filename string `json:"filename"`
	}
	if out := run("map", "--json", over); !json.Valid(out) || bytejson.Unmarshal(out, &extents) != nil {
		t.Errorf("%s", out)
	}
	if len(extents) == 0 || filepath.Base(extents[0].Filename) != base && extents[0].Filename != "" {
		t.Errorf("%+v", extents)
	}
	var d diagnosis
	if err := bytejson.Unmarshal(run("doctor", "--json"), &d); err != nil || !strings.Contains(d.Findings[1].Found+d.Findings[1].Advice, evil) {
		t.Errorf("%+v, %v", d, err)
	}
	if err := os.Remove(filepath.Join(dir, base)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"info", over}, {"map", over}, {"check", over}, {"create", "-b", base, "new.cow"}, {"run", "--disk", over, "--", "x"}} {
		run(args...)
	}
}
