package main

import (
	"bufio"
	"fmt"
	"os"
	"strings"
	"testing"
)

// The heap is marked "nh": no huge pages (proc(5), VmFlags of smaps).
func TestNoHugeHeap(t *testing.T) {
	var at uint64
	if _, err := fmt.Sscanf(fmt.Sprintf("%p", new([4096]byte)), "0x%x", &at); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	noHugeHeap()
	here := false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		var from, to uint64
		if n, _ := fmt.Sscanf(lines.Text(), "%x-%x ", &from, &to); n == 2 {
			here = from <= at && at < to
		}
		if flags, ok := strings.CutPrefix(lines.Text(), "VmFlags:"); ok && here {
			if !strings.Contains(flags+" ", " nh ") {
				t.Errorf("the heap has the flags%s", flags)
			}
			return
		}
	}
	t.Error("the heap is not among the mappings")
}
