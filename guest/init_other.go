//go:build !linux

package guest

import (
	"fmt"
	"os"
)

// InitMain is the init of a guest; guests run Linux.
func InitMain() {
	fmt.Fprintln(os.Stderr, "moovm: the init of a guest runs on Linux only")
	os.Exit(1)
}
