package main

import (
	"os"
	"strings"
	"testing"

	"github.com/moovm/moovm/vmm"
)

// TestHundredClones: all of them answer, and no two answer the same.
func TestHundredClones(t *testing.T) {
	if f, err := os.OpenFile(vmm.DefaultKVM, os.O_RDWR, 0); err != nil {
		t.Skipf("needs a KVM device (load kvm-intel or kvm-amd, or join the kvm group): %v", err)
	} else {
		f.Close()
	}
	var out strings.Builder
	if err := run(&out, 100); err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for line := range strings.Lines(out.String()) {
		if _, name, ok := strings.Cut(strings.TrimSpace(line), " is "); ok && len(name) == 16 {
			names[name] = true
		}
	}
	if len(names) != 100 || !strings.HasSuffix(out.String(), "still running\n") {
		t.Errorf("%d different clones:\n%s", len(names), out.String())
	}
}
