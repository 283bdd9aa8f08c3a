//go:build linux && amd64

package confine_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/confine"
	"github.com/moovm/moovm/internal/kvm"
)

// A process cannot be let go again, so each test confines a child: this test
// binary, told by the environment what to do.

func TestMain(m *testing.M) {
	if dir := os.Getenv("CONFINE_CHILD"); dir != "" {
		child(dir)
		return
	}
	if argument := os.Getenv("CONFINE_INTERNET"); argument != "" {
		internetChild(argument)
		return
	}
	os.Exit(m.Run())
}

// child confines itself and says how its attempts went, "NAME: ERROR" a line.
func child(dir string) {
	try := func(name string, err error) {
		if err == nil {
			fmt.Println(name + ": done")
		} else {
			fmt.Println(name+":", strings.ReplaceAll(err.Error(), "\n", " "))
		}
	}
	open, err := os.OpenFile(filepath.Join(dir, "elsewhere"), os.O_RDWR, 0)
	try("before", err)
	listener, err := net.Listen("unix", filepath.Join(dir, "socket"))
	try("listen", err)

	// A thread from before, inside a system call while Apply runs.
	old := make(chan func())
	ready := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(ready)
		for f := range old {
			f()
		}
	}()
	<-ready

	held, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	try("folder", err)
	try("inherited before", isFile(inherited, open))
	var threads []*os.File
	names, _ := filepath.Glob("/proc/self/task/*/status")
	for _, name := range names {
		if f, err := os.Open(name); err == nil {
			threads = append(threads, f)
		}
	}
	var n confine.Needs
	if os.Getenv("CONFINE_NEEDS") != "" {
		n = confine.Needs{Read: []string{filepath.Join(dir, "ro")}, Write: []string{filepath.Join(dir, "rw")}, Remove: []string{filepath.Join(dir, "rm")}, Sockets: true}
	}
	r, err := confine.Apply(n)
	try("apply", err)
	fmt.Printf("result: landlock=%v seccomp=%v\n", r.Landlock > 0, r.Seccomp)
	fmt.Printf("root: %v\n", r.Root)
	try("inherited", isFile(inherited, open))
	try("every other call", otherCalls(os.Getenv("CONFINE_NEEDS") != ""))
	try("every other request", otherRequests(int(open.Fd())))
	if r.Root {
		try("looks outside", looksOutside(held, dir))
	}

	var wg sync.WaitGroup
	wg.Add(1)
	old <- func() { defer wg.Done(); attacks("old thread ", try) }
	wg.Wait()
	close(old)
	attacks("", try)
	wg.Go(func() {
		runtime.LockOSThread() // never unlocked: a thread of its own that ends
		attacks("new thread ", try)
	})
	wg.Wait()

	// Requests that are allowed get as far as the file, which has none of them.
	for name, request := range map[string]uint{"KVM_RUN": 0xae80, "KVM_IOEVENTFD": 0x4040ae79, "KVM_IRQFD": 0x4020ae76,
		"KVM_SET_GSI_ROUTING": 0x4008ae6a, "TCGETS": unix.TCGETS, "TCSETS": unix.TCSETS} {
		err := unix.IoctlSetInt(int(open.Fd()), request, 0)
		if err == unix.ENOTTY {
			err = nil
		}
		try(name, err)
	}
	if r.Capabilities {
		try("capabilities", onlyCapabilities(threads, n))
	}
	_, err = unix.FcntlInt(open.Fd(), unix.F_GETFL, 0)
	try("F_GETFL", err)
	_, err = unix.FcntlInt(open.Fd(), unix.F_SETFL, unix.O_NONBLOCK)
	try("F_SETFL", err)
	try("F_OFD_SETLK", unix.FcntlFlock(open.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}))
	dup, err := unix.FcntlInt(open.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	try("F_DUPFD_CLOEXEC", err)
	unix.Close(dup)
	try("fchmod", open.Chmod(0o640))
	_, _, errno := unix.RawSyscall6(unix.SYS_UTIMENSAT, open.Fd(), 0, 0, 0, 0, 0)
	try("futimens", noError(errno))
	// What must go on working: open files, memory, threads, time.
	_, err = open.WriteAt([]byte("x"), 0)
	try("open file", errors.Join(err, open.Sync()))
	for range 30 {
		wg.Go(func() {
			runtime.LockOSThread()
			b := make([]byte, 4<<20)
			b[len(b)-1] = 1
			time.Sleep(time.Millisecond)
		})
	}
	wg.Wait()
	runtime.GC()
	try("threads", nil)

	_, err = os.ReadFile(filepath.Join(dir, "ro", "file"))
	try("read ro", err)
	try("write ro", os.WriteFile(filepath.Join(dir, "ro", "file"), nil, 0o666))
	try("remove ro", os.Remove(filepath.Join(dir, "ro", "file")))
	try("write rw", os.WriteFile(filepath.Join(dir, "rw", "new"), []byte("new"), 0o666))
	try("mkdir rw", os.Mkdir(filepath.Join(dir, "rw", "d"), 0o777))
	try("rename rw", os.Rename(filepath.Join(dir, "rw", "new"), filepath.Join(dir, "rw", "d", "moved")))
	_, err = os.ReadFile(filepath.Join(dir, "rm", "file"))
	try("read rm", err)
	for name, kind := range map[string]uint32{"character device": unix.S_IFCHR, "block device": unix.S_IFBLK} {
		try(name, unix.Mknodat(unix.AT_FDCWD, filepath.Join(dir, "rw", "device"), kind|0o666, 0))
	}
	try("FIFO", unix.Mknodat(unix.AT_FDCWD, filepath.Join(dir, "rw", "fifo"), unix.S_IFIFO|0o666, 0))
	try("file by renaming outside", os.Rename(filepath.Join(dir, "rw", "d", "moved"), filepath.Join(dir, "ro", "moved")))
	try("remove rm", os.Remove(filepath.Join(dir, "rm", "file")))
	try("write elsewhere", os.WriteFile(filepath.Join(dir, "elsewhere"), nil, 0o666))
	if os.Getenv("CONFINE_NEEDS") != "" {
		c, err := listener.Accept()
		try("accept", err)
		_, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", open.Fd()))
		try("name of a descriptor", err)
		line, err := bufio.NewReader(c).ReadString('\n')
		try("message "+strings.TrimSpace(line), err)
	}
}

// inherited is the number of a descriptor that the child's parent left open.
const inherited = 3

var errNotOpen = errors.New("it is not open")

// isFile says whether a descriptor is the file f; its number may be used anew.
func isFile(fd int, f *os.File) error {
	var a, b unix.Stat_t
	if unix.Fstat(fd, &a) != nil || unix.Fstat(int(f.Fd()), &b) != nil || a.Ino != b.Ino || a.Dev != b.Dev {
		return errNotOpen
	}
	return nil
}

// otherCalls makes every system call that is not on the list, by its number,
// with arguments that none of them takes.
func otherCalls(needs bool) error {
	allowed := []int{
		unix.SYS_IOCTL, unix.SYS_READ, unix.SYS_WRITE, unix.SYS_PREAD64, unix.SYS_PWRITE64, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_PREADV,
		unix.SYS_PWRITEV, unix.SYS_PREADV2, unix.SYS_PWRITEV2, unix.SYS_LSEEK, unix.SYS_CLOSE, unix.SYS_DUP, unix.SYS_DUP3, unix.SYS_FCNTL,
		unix.SYS_FSTAT, unix.SYS_FSTATFS, unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_SYNC_FILE_RANGE, unix.SYS_FALLOCATE, unix.SYS_FTRUNCATE,
		unix.SYS_FLOCK, unix.SYS_FADVISE64, unix.SYS_COPY_FILE_RANGE, unix.SYS_SPLICE, unix.SYS_SENDFILE, unix.SYS_POLL, unix.SYS_PPOLL,
		unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_PWAIT, unix.SYS_EVENTFD2, unix.SYS_PIPE2,
		unix.SYS_MMAP, unix.SYS_MPROTECT, unix.SYS_MUNMAP, unix.SYS_MREMAP, unix.SYS_MADVISE, unix.SYS_BRK, unix.SYS_MINCORE,
		unix.SYS_CLONE, unix.SYS_TGKILL, unix.SYS_FUTEX, unix.SYS_SET_ROBUST_LIST, unix.SYS_RSEQ, unix.SYS_SIGALTSTACK, unix.SYS_RT_SIGACTION,
		unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_GETTID, unix.SYS_GETPID,
		unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_RESTART_SYSCALL, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME,
		unix.SYS_CLOCK_GETRES, unix.SYS_GETTIMEOFDAY, unix.SYS_GETRANDOM, unix.SYS_GETUID, unix.SYS_GETEUID, unix.SYS_GETGID, unix.SYS_GETEGID, unix.SYS_UNAME,
	}
	if needs {
		allowed = append(allowed, unix.SYS_ACCEPT4, unix.SYS_SHUTDOWN, unix.SYS_GETSOCKOPT, unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME,
			unix.SYS_RECVFROM, unix.SYS_RECVMSG, unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_MEMFD_CREATE, unix.SYS_READLINK, unix.SYS_READLINKAT,
			unix.SYS_OPEN, unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_GETDENTS64, unix.SYS_UNLINK, unix.SYS_UNLINKAT,
			unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_LINKAT, unix.SYS_SYMLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_FCHMOD, unix.SYS_UTIMENSAT)
	}
	const none, x32 = ^uintptr(0), 1 << 30
	var made []string
	call := func(number int) {
		want := unix.EPERM
		if number == unix.SYS_CLONE3 || number >= x32 {
			want = unix.ENOSYS
		}
		if _, _, errno := unix.RawSyscall6(uintptr(number), none, none, none, none, none, none); errno != want {
			made = append(made, fmt.Sprintf("%d: %v", number, errno))
		}
	}
	for number := range 600 { // Linux 6.16 ends at 469
		// 335 and 336 are traps of the kernel's own probes: SIGILL for others.
		if !slices.Contains(allowed, number) && number != 335 && number != 336 {
			call(number)
		}
	}
	for _, number := range []int{unix.SYS_READ, unix.SYS_MMAP, unix.SYS_OPENAT, 520 /* execve */} {
		call(x32 | number)
	}
	if made != nil {
		return errors.New(strings.Join(made, ", "))
	}
	return nil
}

// otherRequests tries ioctls that are not on the list, some of which would work
// on this very file.
func otherRequests(fd int) error {
	var made []string
	refused := func(request uintptr) {
		if _, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), request, 0); errno != unix.EPERM {
			made = append(made, fmt.Sprintf("%#x: %v", request, errno))
		}
	}
	known := append(kvm.Requests(), unix.TCGETS, unix.TCSETS, unix.TCSETSW, unix.TCSETSF, unix.TIOCGWINSZ)
	for _, request := range []uintptr{
		// KVM's: devices (VFIO), encrypted guests, signal masks, nested state, dirty
		// logs, Xen, MSR filters, guests' memory of files.
		0xc00caee0, 0xc008aeba, 0x4004ae8b, 0xc080aebe, 0x4010ae42, 0x4038ae7a, 0x4188aec6, 0xc040aed4, 0x40a0ae49,
		// A known number with another size or direction.
		0x4040ae76, 0x8000ae80, 0xc000ae80,
		// Files: flags, clones, holes' maps, freezing, encryption, fs-verity.
		unix.FS_IOC_SETFLAGS, unix.FS_IOC_GETFLAGS, unix.FICLONE, unix.FICLONERANGE, 0xc020660b, 0xc0045877, unix.FS_IOC_ADD_ENCRYPTION_KEY, unix.FS_IOC_ENABLE_VERITY,
		// Descriptors.
		0x541b /* FIONREAD */, 0x5421 /* FIONBIO */, 0x5450 /* FIONCLEX */, 0x5451, 0x5452 /* FIOASYNC */, 0x8901 /* FIOSETOWN */, 0x8902, 0x8904,
		// Terminals: input for others, the controlling terminal, packets, consoles.
		unix.TIOCSTI, unix.TIOCSCTTY, unix.TIOCNOTTY, unix.TIOCSETD, unix.TIOCLINUX, unix.TIOCCONS, unix.TIOCSWINSZ, unix.TIOCSPGRP, unix.TIOCVHANGUP, unix.TIOCGPTPEER, unix.TCFLSH, unix.TCSBRK,
		// Disks, networks, namespaces.
		unix.BLKDISCARD, unix.BLKZEROOUT, unix.BLKRRPART, unix.BLKROSET, unix.SIOCSIFFLAGS, unix.TUNSETIFF, unix.NS_GET_PARENT, unix.NS_GET_USERNS,
		0, 1, ^uintptr(0), ^uintptr(0) >> 32,
	} {
		refused(request)
	}
	for _, r := range known {
		refused(1<<32 | uintptr(r))
		refused(1<<63 | uintptr(r))
		for _, near := range []uint32{r ^ 1<<31, r ^ 1<<16, r ^ 1<<15} {
			if !slices.Contains(known, near) {
				refused(uintptr(near))
			}
		}
	}
	if made != nil {
		return errors.New(strings.Join(made, ", "))
	}
	return nil
}

// looksOutside tries to see whether there are other files than those below the
// folders, by what Landlock does not restrict. It returns nil if it cannot.
func looksOutside(held int, dir string) error {
	var saw []string
	look := func(at int, name string) {
		fd, err := unix.Openat(at, name, unix.O_PATH|unix.O_NOFOLLOW, 0)
		if err == nil {
			unix.Close(fd)
		}
		if err != unix.ENOENT && err != unix.EPERM { // EPERM: nothing may be opened at all
			saw = append(saw, fmt.Sprintf("%s: %v", name, err))
		}
		if _, err := unix.Readlink(name, make([]byte, 64)); at == unix.AT_FDCWD && err != unix.ENOENT && err != unix.EPERM {
			saw = append(saw, fmt.Sprintf("link %s: %v", name, err))
		}
	}
	up := strings.Repeat("../", 32)
	for _, name := range []string{"/etc/shadow", "/bin", "/root", up + "etc/shadow", filepath.Join(dir, "elsewhere"), filepath.Join(dir, "ro/../elsewhere"),
		fmt.Sprintf("/proc/%d/root", os.Getppid()), "/proc/1/root", "/proc/sys", "/proc/self/root/etc/shadow", "/proc/self/cwd/" + up + "etc/shadow"} {
		look(unix.AT_FDCWD, name)
	}
	look(held, up+"etc/shadow")
	look(held, "../"+filepath.Base(filepath.Dir(dir))+"/../etc")
	if saw != nil {
		return errors.New(strings.Join(saw, ", "))
	}
	return nil
}

// onlyCapabilities looks at those of the threads whose status files these are.
func onlyCapabilities(threads []*os.File, n confine.Needs) error {
	allowed := uint64(0)
	if len(n.Write) > 0 {
		allowed = 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER
	}
	for _, f := range threads {
		b := make([]byte, 1<<14)
		k, err := f.ReadAt(b, 0)
		if errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if k == 0 {
			return err
		}
		for _, name := range []string{"CapEff", "CapPrm"} {
			_, rest, _ := strings.Cut(string(b[:k]), name+":\t")
			line, _, _ := strings.Cut(rest, "\n")
			if set, err := strconv.ParseUint(line, 16, 64); err != nil || set&^allowed != 0 {
				return fmt.Errorf("%s of a thread: %q", name, line)
			}
		}
	}
	return nil
}

// attacks tries what somebody who took the process over would.
func attacks(who string, try func(string, error)) {
	_, err := os.Open("/etc/shadow")
	try(who+"shadow", err)
	_, err = os.Open("/proc/self/mem")
	try(who+"memory file", err)
	try(who+"exec", exec.Command("/bin/true").Run())
	try(who+"execve", unix.Exec("/bin/true", []string{"true"}, nil))
	_, err = net.Dial("tcp", "127.0.0.1:1")
	try(who+"connect", err)
	for name, s := range map[string][2]int{"unix": {unix.AF_UNIX, unix.SOCK_STREAM}, "udp": {unix.AF_INET, unix.SOCK_DGRAM}, "netlink": {unix.AF_NETLINK, unix.SOCK_RAW}} {
		_, err = unix.Socket(s[0], s[1], 0)
		try(who+"socket "+name, err)
	}
	try(who+"signal", unix.Kill(os.Getppid(), 0))
	try(who+"trace", unix.PtraceAttach(os.Getppid()))
	try(who+"mount", unix.Mount("none", "/mnt", "tmpfs", 0, ""))
	_, err = unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_ANON|unix.MAP_PRIVATE)
	try(who+"executable memory", err)
	try(who+"terminal input", unix.IoctlSetPointerInt(0, unix.TIOCSTI, 'x'))
	pid, _, errno := unix.RawSyscall(unix.SYS_FORK, 0, 0, 0)
	if pid == 0 && errno == 0 {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
	try(who+"fork", noError(errno))
	// Arguments that look like other calls' numbers: a thread that is none,
	// whose stack looks like KVM_RUN.
	pid, _, errno = unix.RawSyscall(unix.SYS_CLONE, unix.SYS_IOCTL, 0xae80, 0)
	if pid == 0 && errno == 0 {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
	}
	try(who+"disguised fork", noError(errno))
	try(who+"disguised ioctl", unix.IoctlSetInt(0, unix.SYS_WRITE, 0))
	try(who+"foreign thread", unix.Tgkill(os.Getppid(), os.Getppid(), 0))
	try(who+"namespace", unix.Unshare(unix.CLONE_NEWUSER))
	byArgument(who, try)
	byPath(who, filepath.Join(os.Getenv("CONFINE_CHILD"), "elsewhere"), try)
}

// byArgument tries what the arguments of allowed calls can do.
func byArgument(who string, try func(string, error)) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		try(who+"pipe", err)
		return
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	fcntl := func(name string, command, arg int) {
		_, err := unix.FcntlInt(uintptr(p[0]), command, arg)
		try(who+name, err)
	}
	fcntl("F_SETOWN", unix.F_SETOWN, os.Getppid())
	fcntl("F_SETSIG", unix.F_SETSIG, int(unix.SIGCONT))
	fcntl("O_ASYNC", unix.F_SETFL, unix.O_ASYNC|unix.O_NONBLOCK)
	fcntl("F_NOTIFY", unix.F_NOTIFY, 1)
	fcntl("F_SETLEASE", unix.F_SETLEASE, unix.F_RDLCK)
	fcntl("F_SETPIPE_SZ", unix.F_SETPIPE_SZ, 1<<20)
	_, _, errno := unix.RawSyscall(unix.SYS_FCNTL, uintptr(p[0]), 1<<32|unix.F_SETOWN, uintptr(os.Getppid()))
	try(who+"F_SETOWN, upper half set", noError(errno))
	_, _, errno = unix.RawSyscall(unix.SYS_IOCTL, uintptr(p[0]), 1<<32|0xae80, 0)
	try(who+"ioctl, upper half set", noError(errno))
	on := 1
	try(who+"FIOASYNC", unix.IoctlSetPointerInt(p[0], 0x5452, on))
	try(who+"prctl", unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0))
	_, _, errno = unix.RawSyscall(unix.SYS_CLONE, unix.CLONE_VM|unix.CLONE_SIGHAND|unix.CLONE_THREAD|unix.CLONE_NEWNS, 0, 0)
	try(who+"thread with mounts of its own", noError(errno))
	for _, flags := range []uintptr{unix.CLONE_PIDFD, unix.CLONE_PTRACE, unix.CLONE_UNTRACED, unix.CLONE_PARENT, unix.CLONE_IO, unix.CLONE_VFORK, unix.CLONE_NEWUSER,
		uintptr(unix.SIGCHLD), 1 << 32, 1 << 33} {
		_, _, errno = unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_VM|unix.CLONE_SIGHAND|unix.CLONE_THREAD|flags, 0, 0, 0, 0, 0)
		if errno != unix.EPERM {
			break
		}
	}
	try(who+"threads that are more", noError(errno))
	for _, prot := range []int{unix.PROT_EXEC, unix.PROT_EXEC | unix.PROT_WRITE, unix.PROT_EXEC | unix.PROT_GROWSDOWN} {
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err == nil {
			err = unix.Mprotect(b, prot)
			unix.Munmap(b)
		}
		if err != unix.EPERM {
			try(who+"memory made executable", err)
			return
		}
	}
	try(who+"memory made executable", unix.EPERM)
}

// byPath tries what Landlock does not restrict.
func byPath(who, path string, try func(string, error)) {
	var st unix.Stat_t
	var stx unix.Statx_t
	var fs unix.Statfs_t
	b := make([]byte, 16)
	for name, err := range map[string]error{
		"chmod": unix.Chmod(path, 0o777), "fchmodat": unix.Fchmodat(unix.AT_FDCWD, path, 0o777, 0), "fchmodat2": unix.Fchmodat(unix.AT_FDCWD, path, 0o777, unix.AT_SYMLINK_NOFOLLOW),
		"chown": unix.Chown(path, 0, 0), "lchown": unix.Lchown(path, 0, 0), "fchownat": unix.Fchownat(unix.AT_FDCWD, path, 0, 0, 0),
		"utimensat": unix.UtimesNano(path, make([]unix.Timespec, 2)), "utimes": unix.Utimes(path, make([]unix.Timeval, 2)), "truncate": unix.Truncate(path, 0),
		"stat": unix.Stat(path, &st), "lstat": unix.Lstat(path, &st), "fstatat": unix.Fstatat(unix.AT_FDCWD, path, &st, 0),
		"statx": unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_ALL, &stx), "statfs": unix.Statfs(path, &fs),
		"access": unix.Access(path, unix.R_OK), "faccessat": unix.Faccessat(unix.AT_FDCWD, path, unix.R_OK, unix.AT_EACCESS),
		"setxattr": unix.Setxattr(path, "user.x", b, 0), "removexattr": unix.Removexattr(path, "user.x"), "chroot": unix.Chroot("/"), "chdir": unix.Chdir("/"),
	} {
		try(who+name, err)
	}
	_, err := unix.Getxattr(path, "user.x", b)
	try(who+"getxattr", err)
	_, err = unix.Listxattr(path, b)
	try(who+"listxattr", err)
}

func noError(errno unix.Errno) error {
	if errno == 0 {
		return nil
	}
	return errno
}

// runChild returns what the child said, by name.
func runChild(t *testing.T, env ...string) map[string]string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"ro", "rw", "rm"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o777); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"ro/file", "rm/file", "elsewhere"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("text"), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	leaked, err := os.Open(filepath.Join(dir, "elsewhere"))
	if err != nil {
		t.Fatal(err)
	}
	defer leaked.Close()
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.ExtraFiles = []*os.File{leaked}
	cmd.Env = append(append(os.Environ(), env...), "CONFINE_CHILD="+dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 1000 { // until it listens
			if c, err := net.Dial("unix", filepath.Join(dir, "socket")); err == nil {
				fmt.Fprintln(c, "hello")
				c.Close()
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	<-done
	said := map[string]string{}
	for _, line := range strings.Split(out.String(), "\n") {
		if name, rest, ok := strings.Cut(line, ": "); ok {
			said[name] = rest
		}
	}
	if said["apply"] == confine.ErrUnsupported.Error() {
		t.Skip("needs a kernel with seccomp filters (CONFIG_SECCOMP_FILTER) or Landlock (CONFIG_SECURITY_LANDLOCK)")
	}
	if said["apply"] != "done" {
		t.Fatalf("apply: %q", said["apply"])
	}
	if said["result"] != "landlock=true seccomp=true" {
		t.Skipf("needs a kernel with Landlock and seccomp filters; this one: %s", said["result"])
	}
	if s, ok := said["looks outside"]; ok && s != "done" {
		t.Errorf("looks outside: %s", s)
	}
	if c, ok := said["capabilities"]; ok && c != "done" {
		t.Errorf("capabilities: %s", c)
	}
	for name, want := range map[string]string{"before": "done", "folder": "done", "inherited before": "done", "every other call": "done", "every other request": "done",
		"inherited": errNotOpen.Error(), "listen": "done", "apply": "done", "open file": "done", "threads": "done",
		"KVM_RUN": "done", "KVM_IOEVENTFD": "done", "KVM_IRQFD": "done", "KVM_SET_GSI_ROUTING": "done", "TCGETS": "done", "TCSETS": "done",
		"F_GETFL": "done", "F_SETFL": "done", "F_OFD_SETLK": "done", "F_DUPFD_CLOEXEC": "done"} {
		if said[name] != want {
			t.Errorf("%s: %s", name, said[name])
		}
	}
	return said
}

// wantRefused fails for every attack that was not refused for lack of
// permission.
func wantRefused(t *testing.T, said map[string]string, names ...string) {
	t.Helper()
	for _, n := range names {
		s := said[n]
		if said["root"] == "true" && (strings.HasSuffix(n, "shadow") || strings.HasSuffix(n, "exec")) && strings.HasSuffix(s, unix.ENOENT.Error()) {
			continue // there is no such file any more
		}
		if !strings.HasSuffix(s, unix.EPERM.Error()) && !strings.HasSuffix(s, unix.EACCES.Error()) {
			t.Errorf("%s: %q, want it refused", n, s)
		}
	}
}

func attackNames() (names []string) {
	for _, who := range []string{"", "old thread ", "new thread "} {
		for _, a := range []string{"shadow", "memory file", "exec", "execve", "connect", "socket unix", "socket udp", "socket netlink",
			"signal", "trace", "mount", "executable memory", "terminal input", "fork", "disguised fork", "disguised ioctl", "foreign thread", "namespace",
			"F_SETOWN", "F_SETSIG", "O_ASYNC", "F_NOTIFY", "F_SETLEASE", "F_SETPIPE_SZ", "F_SETOWN, upper half set", "ioctl, upper half set", "FIOASYNC", "prctl",
			"thread with mounts of its own", "threads that are more", "memory made executable",
			"chmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchownat", "utimensat", "utimes", "truncate", "stat", "lstat", "fstatat", "statx", "statfs",
			"access", "faccessat", "setxattr", "removexattr", "chroot", "chdir", "getxattr", "listxattr"} {
			names = append(names, who+a)
		}
	}
	return names
}

func TestNothingNeeded(t *testing.T) {
	said := runChild(t)
	wantRefused(t, said, attackNames()...)
	wantRefused(t, said, "fchmod", "futimens")
	wantRefused(t, said, "read ro", "write ro", "remove ro", "write rw", "mkdir rw", "read rm", "remove rm", "write elsewhere")
}

func TestFoldersAndSockets(t *testing.T) {
	said := runChild(t, "CONFINE_NEEDS=1")
	wantRefused(t, said, attackNames()...)
	wantRefused(t, said, "write ro", "remove ro", "read rm", "character device", "block device")
	if s := said["write elsewhere"]; said["root"] == "true" && !strings.HasSuffix(s, unix.EROFS.Error()) {
		t.Errorf("write elsewhere: %s", s)
	} else if said["root"] != "true" {
		wantRefused(t, said, "write elsewhere")
	}
	if said["file by renaming outside"] == "done" {
		t.Error("a file was moved into a folder that is read-only")
	}
	for _, name := range []string{"FIFO", "read ro", "write rw", "mkdir rw", "rename rw", "remove rm", "accept", "name of a descriptor", "message hello", "fchmod", "futimens"} {
		if said[name] != "done" {
			t.Errorf("%s: %q", name, said[name])
		}
	}
}

// Confining is for good, so this is not run.
func ExampleApply() {
	r, err := confine.Apply(confine.Needs{Read: []string{"/srv/share"}})
	if err != nil && !errors.Is(err, confine.ErrUnsupported) {
		fmt.Println(err)
		return
	}
	fmt.Println("Landlock version", r.Landlock, "system call filter", r.Seccomp)
}
