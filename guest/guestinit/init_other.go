//go:build !linux

package guestinit

import (
	"fmt"
	"os"
)

// Main is the init of a guest; guests run Linux.
func Main() {
	fmt.Fprintln(os.Stderr, "moovm: the init of a guest runs on Linux only")
	os.Exit(1)
}
