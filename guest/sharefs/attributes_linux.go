package sharefs

import "golang.org/x/sys/unix"

// Mode and times are changed by an open descriptor, which a confined process
// may do: a change by path would reach any file of its user. A file that cannot
// be opened (a FIFO, a socket, a symbolic link, one without permissions) is
// changed by path, which a confined process is refused.

// withOpen opens the regular file or folder that h holds, for f.
func (h *handle) withOpen(kind uint32, flags int, f func(fd int) error) error {
	if kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return unix.EACCES
	}
	if h.s.open.Load() >= h.s.max {
		return unix.EMFILE
	}
	fd, err := retry(func() (int, error) { return unix.Open(h.proc(), flags|safeFlags, 0) })
	if err != nil {
		return err
	}
	opened := h.s.hold(fd)
	defer opened.release()
	return f(fd)
}

// change applies f to a descriptor that is open in any way; without one, it
// returns EACCES.
func (h *handle) change(kind uint32, f func(fd int) error) error {
	err := h.withOpen(kind, unix.O_RDONLY, f)
	if err == unix.EACCES && kind == unix.S_IFREG {
		err = h.withOpen(kind, unix.O_WRONLY, f)
	}
	return err
}

// chmod changes the mode of what h holds, which is no symbolic link.
func (h *handle) chmod(kind, mode uint32) error {
	err := h.change(kind, func(fd int) error { return unix.Fchmod(fd, mode) })
	if err == unix.EACCES {
		return unix.Chmod(h.proc(), mode)
	}
	return err
}

// utimes sets the times of what h holds. Where those of a symbolic link cannot
// be set, it is ENOSYS, which tools take well.
func (h *handle) utimes(kind uint32, times [2]unix.Timespec) error {
	err := h.change(kind, func(fd int) error { return futimens(fd, &times) })
	if err != unix.EACCES {
		return err
	}
	err = unix.UtimesNanoAt(h.fd, "", times[:], unix.AT_EMPTY_PATH)
	if err == unix.EPERM && kind == unix.S_IFLNK {
		return unix.ENOSYS
	}
	return err
}
