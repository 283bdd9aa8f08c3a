package confine

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// closeInherited closes what whoever started the process left open for it by
// mistake: every descriptor but the standard ones that does not close on
// exec(2), since all that a Go program opens does.
func closeInherited() error {
	return eachDescriptor(func(fd int) error {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			return nil
		}
		return unix.Close(fd)
	})
}

// eachDescriptor calls f for the descriptors above the standard ones. Others
// may be opened and closed meanwhile.
func eachDescriptor(f func(fd int) error) error {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err2 := dir.Close(); err == nil {
		err = err2
	}
	if err != nil {
		return err
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name)
		if err != nil || fd <= 2 {
			continue
		}
		if err := f(fd); err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
	}
	return nil
}
