package main

import (
	"os"
	"strings"
	"testing"

	"github.com/moovm/moovm/vmm"
)

// The fault is found, from one rewind to the next, and the rewinds are counted.
func TestFound(t *testing.T) {
	if f, err := os.OpenFile(vmm.DefaultKVM, os.O_RDWR, 0); err != nil {
		t.Skipf("needs a KVM device (load kvm-intel or kvm-amd, or join the kvm group): %v", err)
	} else {
		f.Close()
	}
	var out strings.Builder
	if err := run(t.Context(), &out, 1); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	if said := out.String(); !strings.Contains(said, `"BUG!" gets to step 4, input `) || !strings.Contains(said, " rewinds a second\n") {
		t.Error(said)
	}
}
