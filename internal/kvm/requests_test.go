package kvm

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// Every request that the package's source makes is in the list.
func TestRequests(t *testing.T) {
	list, err := os.ReadFile("requests.go")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	// The word before "nr" says how it is encoded: iow[Regs](nrSetRegs).
	made := regexp.MustCompile(`\bkvm[A-Z]\w+|\bnr[A-Z]\w+|(?:ior|iow|iowr)\[[\w.]+\]\(nr\w+\)|gokvm\.IIO\w+\(nr\w+, \w+\)`)
	n := 0
	for _, name := range files {
		if name == "requests.go" || strings.HasSuffix(name, "_test.go") {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, request := range made.FindAllString(string(b), -1) {
			n++
			if !strings.Contains(string(list), request) {
				t.Errorf("%s makes the request %s, which is not among Requests", name, request)
			}
		}
	}
	if n < 40 {
		t.Errorf("found only %d requests in the source", n)
	}
	all := Requests()
	slices.Sort(all)
	for i, r := range all {
		if i > 0 && all[i-1] == r {
			t.Errorf("%#x is there twice", r)
		}
		if r>>8&0xff != 0xae {
			t.Errorf("%#x is no request of KVM's", r)
		}
	}
}
