package main

import (
	"fmt"
	"path"
	"strings"

	"github.com/moovm/moovm/guest"
)

// shareFlag is one --share TAG=DIR[,rw].
type shareFlag struct {
	tag, dir string
	text     string // as it was typed, for errors; the request sets it
	writable bool
}

// maxTag is what Linux takes for a mount tag, in bytes.
const maxTag = 127

// parseShare reads TAG=DIR[,rw]. A comma in the folder's name is written twice.
func parseShare(s string) (shareFlag, error) {
	words := splitCommas(s)
	tag, dir, ok := strings.Cut(words[0], "=")
	f := shareFlag{tag: tag, dir: dir}
	switch {
	case !ok || tag == "" || dir == "":
		return f, fmt.Errorf("--share %s: write TAG=DIR or TAG=DIR,rw", s)
	case tag == guest.TreeTag:
		return f, fmt.Errorf("--share %s: the tag %s is taken by the metadata tree", s, tag)
	case len(tag) > maxTag || strings.ContainsAny(tag, "/ ") || tag == "." || tag == "..":
		return f, fmt.Errorf("--share %s: %q is no mount tag; use up to %d letters without / and blanks", s, tag, maxTag)
	}
	for _, w := range words[1:] {
		if w != "rw" && w != "ro" {
			return f, fmt.Errorf("--share %s: there is no option %q; use rw or ro (a comma in the folder's name is written twice)", s, w)
		}
		f.writable = w == "rw"
	}
	if err := ambiguous(append([]string{dir}, words[1:]...)); err != nil {
		return f, fmt.Errorf("--share %s: %w", s, err)
	}
	return f, nil
}

// target is where the guest's init mounts a share.
func (f shareFlag) target() string { return path.Join("/mnt", f.tag) }
