package lineage

import (
	"io"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/cowdisk"
)

// openFlags neither follow a link that came meanwhile nor wait for a FIFO.
const openFlags = unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC

func identity(st fs.FileInfo) (actual int64, id cowdisk.FileID) {
	s, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return st.Size(), id
	}
	return s.Blocks * 512, cowdisk.FileID{Device: uint64(s.Dev), Inode: s.Ino}
}

// inUse asks whether anybody has a lock on the file (F_OFD_GETLK, fcntl(2)),
// and takes none.
func inUse(f *os.File) bool {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l) == nil && l.Type != unix.F_UNLCK
}
