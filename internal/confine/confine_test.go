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
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/confine"
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
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0])
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
	if said["result"] != "landlock=true seccomp=true" {
		t.Skipf("needs a kernel with Landlock and seccomp filters; this one: %s", said["result"])
	}
	if c, ok := said["capabilities"]; ok && c != "done" {
		t.Errorf("capabilities: %s", c)
	}
	for name, want := range map[string]string{"before": "done", "listen": "done", "apply": "done", "open file": "done", "threads": "done",
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
		if s := said[n]; !strings.HasSuffix(s, unix.EPERM.Error()) && !strings.HasSuffix(s, unix.EACCES.Error()) {
			t.Errorf("%s: %q, want it refused", n, s)
		}
	}
}

func attackNames() (names []string) {
	for _, who := range []string{"", "old thread ", "new thread "} {
		for _, a := range []string{"shadow", "memory file", "exec", "execve", "connect", "socket unix", "socket udp", "socket netlink",
			"signal", "trace", "mount", "executable memory", "terminal input", "fork", "disguised fork", "disguised ioctl", "foreign thread", "namespace",
			"F_SETOWN", "F_SETSIG", "O_ASYNC", "F_NOTIFY", "F_SETLEASE", "F_SETPIPE_SZ", "F_SETOWN, upper half set", "ioctl, upper half set", "FIOASYNC", "prctl",
			"thread with mounts of its own",
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
	wantRefused(t, said, "write ro", "remove ro", "read rm", "write elsewhere")
	for _, name := range []string{"read ro", "write rw", "mkdir rw", "rename rw", "remove rm", "accept", "name of a descriptor", "message hello", "fchmod", "futimens"} {
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
