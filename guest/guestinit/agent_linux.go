package guestinit

import (
	"os"

	"golang.org/x/sys/unix"
)

// dropCaches makes the kernel forget pages, names and attributes of files that
// are not in use (Documentation/admin-guide/sysctl/vm.rst).
func dropCaches() {
	_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

func syncFiles() { unix.Sync() }
