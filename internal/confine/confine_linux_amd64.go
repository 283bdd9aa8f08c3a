package confine

import (
	"fmt"
	"slices"
	"time"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Apply confines the process, all its threads and those to come, for good. A
// mechanism that the kernel lacks is left out, as the Result says; a folder
// that does not exist or a mechanism that fails is an error, after which the
// process may be confined in part. Without any mechanism the error is
// ErrUnsupported.
func Apply(n Needs) (Result, error) {
	var r Result
	// What the library would open later.
	_, _ = time.Now().Zone() // reads /etc/localtime

	if err := closeInherited(); err != nil {
		return r, fmt.Errorf("confine: descriptors that were inherited: %w", err)
	}
	var err error
	if len(n.Write) > 0 {
		// What is made from now on has the mode that it is made with: it cannot
		// be changed by path afterwards.
		unix.Umask(0)
	}
	if r.Root, err = privateRoot(n); err != nil {
		return r, err
	}
	if r.Landlock, err = restrictFiles(n); err != nil {
		return r, err
	}
	if r.Capabilities, err = keepCapabilities(capabilities(n)); err != nil {
		return r, fmt.Errorf("confine: %w", err)
	}
	if seccomp.Supported() {
		if err := filterCalls(n); err != nil {
			return r, fmt.Errorf("confine: %w", err)
		}
		r.Seccomp = true
	}
	if r.Landlock == 0 && !r.Seccomp {
		return r, ErrUnsupported
	}
	return r, nil
}

// filterCalls puts the filters of system calls in force. The list of those that
// are allowed comes last: more filters are not among them.
func filterCalls(n Needs) error {
	load := func(p seccomp.Policy) error {
		return seccomp.LoadFilter(seccomp.Filter{NoNewPrivs: true, Flag: seccomp.FilterFlagTSync, Policy: p})
	}
	for _, p := range refusals() {
		if err := load(p); err != nil {
			return err
		}
	}
	program, err := requestFilter(requests())
	if err == nil {
		err = loadFilter(program)
	}
	if err != nil {
		return fmt.Errorf("the filter of ioctl: %w", err)
	}
	return load(allowed(n))
}

// capabilities are those that a root process needs to go on with the files of
// other users, in its folders.
func capabilities(n Needs) (set uint64) {
	switch {
	case len(n.Write)+len(n.Images) > 0:
		set = 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER
	case len(n.Read) > 0:
		set = 1 << unix.CAP_DAC_READ_SEARCH
	}
	if len(n.Remove) > 0 {
		set |= 1 << unix.CAP_DAC_OVERRIDE
	}
	return set
}

// Rights in folders. To execute is none of them.
const (
	rightsRead  = ll.AccessFSReadFile | ll.AccessFSReadDir
	rightsWrite = rightsRead | ll.AccessFSWriteFile | ll.AccessFSTruncate | ll.AccessFSRemoveDir | ll.AccessFSRemoveFile |
		ll.AccessFSMakeDir | ll.AccessFSMakeReg | ll.AccessFSMakeSym | ll.AccessFSMakeFifo | ll.AccessFSMakeSock
)

// restrictFiles puts Landlock in force and returns its version.
func restrictFiles(n Needs) (int, error) {
	version, err := ll.LandlockGetABIVersion()
	if err != nil || version <= 0 {
		// ENOSYS: not in the kernel; EOPNOTSUPP: switched off at boot.
		return 0, nil
	}
	write := landlock.AccessFSSet(rightsWrite)
	if version >= 2 {
		write |= ll.AccessFSRefer // rename and link between folders
	}
	var rules []landlock.Rule
	if len(n.Read) > 0 {
		rules = append(rules, landlock.PathAccess(rightsRead, n.Read...))
	}
	if len(n.Write) > 0 {
		rules = append(rules, landlock.PathAccess(write, n.Write...))
	}
	if len(n.Images) > 0 {
		rules = append(rules, landlock.PathAccess(write&^(ll.AccessFSMakeDir|ll.AccessFSMakeSym|ll.AccessFSMakeFifo|ll.AccessFSMakeSock|ll.AccessFSRemoveDir), n.Images...))
	}
	if len(n.Remove) > 0 {
		rules = append(rules, landlock.PathAccess(ll.AccessFSRemoveFile, n.Remove...))
	}
	// V5 and not later: scoped signals (V6) would stop the threads from
	// signalling each other on kernels before 6.15.
	restrict := landlock.V5.BestEffort().Restrict
	if n.Internet {
		restrict = landlock.V5.BestEffort().RestrictPaths // TCP stays
	}
	if err := restrict(rules...); err != nil {
		return 0, fmt.Errorf("confine: Landlock: %w", err)
	}
	return version, nil
}

// All filters are asked about a system call, and the strictest answer counts:
// one allows a list of calls, and for each of those that is dangerous with some
// arguments another refuses it then. They are not one filter because the
// library (v1.6.0) forgets the call's number once it has looked at arguments:
// what comes after that is compared with an argument.

// allowed lists the calls that are allowed, by their numbers alone.
func allowed(n Needs) seccomp.Policy {
	names := []string{
		"ioctl", // the first, as most calls are KVM_RUN
		// Descriptors that are open.
		"read", "write", "pread64", "pwrite64", "readv", "writev", "preadv", "pwritev", "preadv2", "pwritev2",
		"lseek", "close", "dup", "dup3", "fcntl", "fstat", "fstatfs", "fsync", "fdatasync", "sync_file_range", "fallocate", "ftruncate",
		"flock", "fadvise64", "copy_file_range", "splice", "sendfile",
		"poll", "ppoll", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "eventfd2", "pipe2",
		// Memory.
		"mmap", "mprotect", "munmap", "mremap", "madvise", "brk", "mincore",
		// Threads, signals and time.
		"clone", "tgkill", "futex", "set_robust_list", "rseq", "sigaltstack", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn",
		"sched_yield", "sched_getaffinity", "gettid", "getpid", "exit", "exit_group", "restart_syscall",
		"nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres", "gettimeofday",
		"getrandom", "getuid", "geteuid", "getgid", "getegid", "uname",
	}
	if n.Internet {
		names = append(names, "socket", "connect", "bind", "accept4", "shutdown", "getsockopt", "setsockopt", "getsockname", "getpeername",
			"recvfrom", "recvmsg", "sendto", "sendmsg")
	}
	if n.Sockets {
		names = append(names, "accept4", "shutdown", "getsockopt", "getsockname", "getpeername",
			"recvfrom", "recvmsg", "sendto", "sendmsg", "memfd_create")
	}
	files := len(n.Read)+len(n.Write)+len(n.Images) > 0
	if files || n.Sockets {
		// What /proc tells of a descriptor that was received.
		names = append(names, "readlink", "readlinkat")
	}
	if files {
		// Landlock decides where. It knows nothing of calls that look at a path,
		// or change its mode, owner or times: those are made by descriptor.
		names = append(names, "open", "openat", "openat2", "getdents64")
	}
	if len(n.Write)+len(n.Images)+len(n.Remove) > 0 {
		names = append(names, "unlink", "unlinkat")
	}
	if len(n.Write) > 0 {
		names = append(names, "mkdirat", "mknodat", "linkat", "symlinkat", "renameat", "renameat2", "fchmod", "utimensat")
	}
	if len(n.Images) > 0 {
		names = append(names, "linkat", "renameat2", "fchmod", "umask", "access", "faccessat", "faccessat2", "stat", "lstat", "newfstatat")
	}
	slices.Sort(names[1:])
	return seccomp.Policy{
		DefaultAction: seccomp.ActionErrno,
		Syscalls: []seccomp.SyscallGroup{
			{Action: seccomp.ActionAllow, Names: slices.Compact(names)},
			// Which threads it makes is in memory that a filter cannot see; a C
			// library falls back to clone when it is told that there is none.
			{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{"clone3"}},
		},
	}
}

// refusals refuse what is dangerous of the calls that are allowed, each one
// call.
func refusals() []seccomp.Policy {
	refuse := func(name string, any ...seccomp.ArgumentConditions) seccomp.Policy {
		g := seccomp.SyscallGroup{Action: seccomp.ActionErrno}
		for _, all := range any {
			g.NamesWithCondtions = append(g.NamesWithCondtions, seccomp.NameWithConditions{Name: name, Conditions: all})
		}
		return seccomp.Policy{DefaultAction: seccomp.ActionAllow, Syscalls: []seccomp.SyscallGroup{g}}
	}
	when := func(argument uint32, op seccomp.Operation, value uint64) seccomp.ArgumentConditions {
		return seccomp.ArgumentConditions{{Argument: argument, Operation: op, Value: value}}
	}
	return []seccomp.Policy{
		refuse("mmap", when(2, seccomp.BitsSet, unix.PROT_EXEC)),
		refuse("mprotect", when(2, seccomp.BitsSet, unix.PROT_EXEC)),
		// Threads, no processes; of the flags only those that Go and C libraries
		// give: no namespaces, no pidfd, no tracing.
		refuse("clone", when(0, seccomp.BitsNotSet, unix.CLONE_THREAD), when(0, seccomp.BitsSet, ^uint64(threadFlags))),
		// Signals to threads of this process only.
		refuse("tgkill", when(0, seccomp.NotEqual, uint64(unix.Getpid()))),
		// Sockets of the Internet, no others.
		refuse("socket", seccomp.ArgumentConditions{
			{Argument: 0, Operation: seccomp.NotEqual, Value: unix.AF_INET}, {Argument: 0, Operation: seccomp.NotEqual, Value: unix.AF_INET6},
		}),
		// F_SETOWN, F_SETSIG and their kind signal other processes, and so does
		// O_ASYNC, which F_SETFL sets.
		refuse("fcntl", otherCommands(), seccomp.ArgumentConditions{
			{Argument: 1, Operation: seccomp.Equal, Value: unix.F_SETFL}, {Argument: 2, Operation: seccomp.BitsSet, Value: unix.O_ASYNC},
		}),
		// No devices, which only CAP_MKNOD could make: S_IFCHR is a bit of S_IFBLK.
		refuse("mknodat", when(2, seccomp.BitsSet, unix.S_IFCHR)),
		// The times of what a descriptor holds: without a path.
		refuse("utimensat", when(1, seccomp.NotEqual, 0)),
	}
}

// threadFlags are the flags of clone(2) that make a thread.
const threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM |
	unix.CLONE_SETTLS | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID | unix.CLONE_CHILD_SETTID | unix.CLONE_DETACHED

// otherCommands matches the commands of fcntl that nothing here needs.
func otherCommands() (all seccomp.ArgumentConditions) {
	for _, command := range []uint64{
		unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL, unix.F_DUPFD_CLOEXEC,
		unix.F_OFD_GETLK, unix.F_OFD_SETLK, unix.F_OFD_SETLKW, unix.F_ADD_SEALS, unix.F_GET_SEALS,
	} {
		all = append(all, seccomp.Condition{Argument: 1, Operation: seccomp.NotEqual, Value: command})
	}
	return all
}
