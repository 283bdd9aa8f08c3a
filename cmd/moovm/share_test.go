package main

import "testing"

func TestParseShare(t *testing.T) {
	for s, want := range map[string]shareFlag{
		"src=.":        {tag: "src", dir: "."},
		"src=/a,,b,rw": {tag: "src", dir: "/a,b", writable: true},
		"x=/a=b,ro":    {tag: "x", dir: "/a=b"},
	} {
		if got, err := parseShare(s); err != nil || got != want {
			t.Errorf("parseShare(%q) = %+v, %v; want %+v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "src", "=dir", "src=", "moovm=/", "a/b=/", "a b=/", "..=/", "x=/,wr"} {
		if got, err := parseShare(s); err == nil {
			t.Errorf("parseShare(%q) = %+v; want an error", s, got)
		}
	}
}
