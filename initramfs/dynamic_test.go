package initramfs

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
)

// A dynamic program takes its loader and libraries along, a static one nothing.
func TestLibraryFiles(t *testing.T) {
	const program = "/bin/sh"
	if err := CheckStatic(program); !errors.Is(err, ErrNotStatic) {
		t.Skipf("%s is no dynamic program here (%v)", program, err)
	}
	var names []string
	a := Archive{Init: program, Libraries: true}
	var b bytes.Buffer
	if _, err := a.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	r := cpio.NewReader(&b)
	for {
		h, err := r.Next()
		if err != nil {
			break
		}
		names = append(names, h.Name)
	}
	loader := slices.IndexFunc(names, func(n string) bool { return strings.Contains(n, "/ld-") })
	libc := slices.IndexFunc(names, func(n string) bool { return strings.Contains(n, "libc.") || strings.Contains(n, "libc-") })
	if loader < 0 || libc < 0 {
		t.Errorf("no loader or no C library in %q", names)
	}
	if _, err := (&Archive{Init: program}).Bytes(); !errors.Is(err, ErrNotStatic) {
		t.Errorf("without Libraries: %v", err)
	}
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o777); err != nil {
		t.Fatal(err)
	}
	if files, err := LibraryFiles(script); files != nil || err != nil {
		t.Errorf("a script: %v, %v", files, err)
	}
}
