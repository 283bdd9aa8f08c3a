package confine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Landlock does not restrict who only looks: O_PATH, readlink. Where the
// process may mount, it therefore gets a root folder in which there is nothing
// but its folders, under their own names, and what /proc tells of itself.
//
// A user namespace would give the right to mount to everybody, but in one
// whose only user is this one all other owners of files in shares are
// "nobody"; a guest on the host's root could not work so.

// privateRoot puts the process into such a root. False says that it cannot be
// had here, and that nothing has changed that matters.
func privateRoot(n Needs) (bool, error) {
	folders := slices.Concat(n.Read, n.Write, n.Images, n.Remove)
	if len(folders) == 0 || slices.ContainsFunc(folders, isRoot) {
		return false, nil // it can look at nothing, or at everything
	}
	if err := rerootFolders(); err != nil {
		return false, nil
	}
	fd, err := buildRoot(folders)
	if err != nil {
		return false, nil
	}
	// The descriptor stays open: with it the mounts would go.
	cwd, err := os.Getwd()
	if err != nil {
		cwd = "/"
	}
	if err := unix.Fchdir(fd); err != nil {
		unix.Close(fd)
		return false, nil
	}
	// Of all threads: they share their root and working folder.
	if err := unix.Chroot("."); err != nil {
		unix.Close(fd)
		if err := os.Chdir(cwd); err != nil {
			return false, fmt.Errorf("confine: back from a root that cannot be: %w", err)
		}
		return false, nil
	}
	_ = os.Chdir(cwd) // the names of sockets may be relative
	return true, nil
}

func isRoot(dir string) bool {
	a, err := os.Stat(dir)
	b, err2 := os.Stat("/")
	return err != nil || err2 != nil || os.SameFile(a, b)
}

// buildRoot makes the tree of mounts and returns a descriptor that holds it.
func buildRoot(folders []string) (fd int, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		// For one thread, which ends with this function.
		runtime.LockOSThread()
		if err = unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			return
		}
		fd, err = mountRoot(folders)
	}()
	<-done
	return fd, err
}

// mountRoot does that in the namespace of this thread.
func mountRoot(folders []string) (int, error) {
	const at = "/proc" // there is one everywhere; it is covered
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	cwd, err := os.Getwd()
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = unix.Mount("moovm", at, "tmpfs", flags, "mode=0755,size=1M")
	}
	if err == nil {
		err = errors.Join(os.MkdirAll(at+"/proc", 0o755), os.MkdirAll(at+cwd, 0o755))
	}
	if err == nil {
		// The names first: kernels before 5.8, which apply what they can to
		// everybody's /proc, know the first as little as we want.
		err = unix.Mount("proc", at+"/proc", "proc", flags, "subset=pid,hidepid=ptraceable")
	}
	if err != nil {
		return -1, err
	}
	folders = slices.Clone(folders)
	slices.SortFunc(folders, func(a, b string) int { return len(a) - len(b) })
	var have []string
	for _, dir := range folders {
		if !filepath.IsAbs(dir) {
			return -1, fmt.Errorf("%s is not an absolute path", dir)
		}
		if !slices.ContainsFunc(have, func(h string) bool { return dir == h || strings.HasPrefix(dir, h+"/") }) {
			if err := os.MkdirAll(at+dir, 0o755); err != nil {
				return -1, err
			}
			if err := unix.Mount(dir, at+dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
				return -1, err
			}
			have = append(have, dir)
		}
	}
	if err := unix.Mount("", at, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|flags, ""); err != nil {
		return -1, err
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return -1, err
	}
	for _, dir := range folders {
		if err := sameFolder(fd, dir); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

// sameFolder looks whether a name means the same in the new root. It does not
// where links lead out of the folders.
func sameFolder(root int, dir string) error {
	fd, err := unix.Openat2(root, dir, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var a, b unix.Stat_t
	if err := errors.Join(unix.Fstat(fd, &a), unix.Stat(dir, &b)); err != nil {
		return err
	}
	if a.Dev != b.Dev || a.Ino != b.Ino {
		return fmt.Errorf("%s is another folder in the new root", dir)
	}
	return nil
}

// rerootFolders makes every folder that is held open (by O_PATH, as shares are)
// the root of mounts of its own: ".." leads to itself.
func rerootFolders() error {
	return eachDescriptor(func(fd int) error {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		if err != nil || flags&unix.O_PATH == 0 {
			return nil
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return err
		}
		tree, err := unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE|unix.AT_EMPTY_PATH)
		if err != nil {
			return err
		}
		defer unix.Close(tree)
		return unix.Dup3(tree, fd, unix.O_CLOEXEC)
	})
}
