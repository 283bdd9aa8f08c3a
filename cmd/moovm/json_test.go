package main

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// keys are the names in a JSON object, sorted, with the kind of each value.
func keys(v any) string {
	m, ok := v.(map[string]any)
	if !ok {
		return "no object"
	}
	var s []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		switch m[k].(type) {
		case string:
			k += ":string"
		case float64:
			k += ":number"
		case bool:
			k += ":bool"
		}
		s = append(s, k)
	}
	return strings.Join(s, " ")
}

// The JSON of info, map and check has the names that scripts rely on, and no others.
func TestJSONShape(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "base.img"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (v any) {
		t.Helper()
		cmd := exec.Command("moovm", args...)
		cmd.Dir, cmd.Stderr = dir, os.Stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %v", args, err)
		}
		if len(out) > 0 {
			if err := json.Unmarshal(out, &v); err != nil {
				t.Fatalf("%v: %v: %s", args, err, out)
			}
		}
		return v
	}
	run("create", "-q", "-b", "base.img", "over.cow")
	run("create", "-q", "-s", "1M", "alone.cow")
	run("rebase", "-q", "-b", "", "over.cow") // everything is in the overlay now
	run("rebase", "-u", "-b", "base.img", "over.cow")
	const (
		info     = "actual-size:number backing-filename:string filename:string format:string format-specific full-backing-filename:string virtual-size:number"
		specific = "allocated-sectors:number bitmap-offset:number data-offset:number mtime:number sector-size:number variant:string"
	)
	over := run("info", "--json", "over.cow").(map[string]any)
	if got := keys(over); got != info {
		t.Errorf("info: %s", got)
	}
	if got := keys(over["format-specific"]); got != specific {
		t.Errorf("format-specific: %s", got)
	}
	if got, want := keys(run("info", "--json", "alone.cow")), "actual-size:number filename:string format:string format-specific virtual-size:number"; got != want {
		t.Errorf("info without a base: %s", got)
	}
	chain := run("info", "--chain", "--json", "over.cow").([]any)
	if len(chain) != 2 || keys(chain[0]) != info || keys(chain[1]) != "actual-size:number filename:string format:string virtual-size:number" {
		t.Errorf("chain: %v", chain)
	}
	for _, e := range run("map", "--json", "over.cow").([]any) {
		got := keys(e)
		if want := "data:bool depth:number filename:string length:number offset:number present:bool start:number zero:bool"; got != want && got != "data:bool depth:number length:number present:bool start:number zero:bool" {
			t.Errorf("map: %s", got)
		}
	}
	if got, want := keys(run("check", "--json", "over.cow")), "allocated-sectors:number filename:string leaked-bytes:number problems total-sectors:number"; got != want {
		t.Errorf("check: %s", got)
	}
}
