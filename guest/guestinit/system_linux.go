package guestinit

import (
	"crypto/rand"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"

	"github.com/moovm/moovm/guest/control"
	"golang.org/x/sys/unix"
)

// systemMounts are what systemd mounts beside /proc, /sys, /dev, /run and /tmp.
var systemMounts = [...]control.Mount{
	{Source: "devpts", Target: "/dev/pts", Type: "devpts", Options: "nosuid,noexec,mode=620,gid=5,ptmxmode=666"},
	{Source: "tmpfs", Target: "/dev/shm", Type: "tmpfs", Options: "nosuid,nodev,mode=1777"},
	{Source: "mqueue", Target: "/dev/mqueue", Type: "mqueue", Options: "nosuid,nodev,noexec"},
	{Source: "hugetlbfs", Target: "/dev/hugepages", Type: "hugetlbfs", Options: "mode=1770"},
	{Source: "cgroup2", Target: "/sys/fs/cgroup", Type: "cgroup2", Options: "nosuid,nodev,noexec"},
	{Source: "bpf", Target: "/sys/fs/bpf", Type: "bpf", Options: "nosuid,nodev,noexec,mode=700"},
	{Source: "securityfs", Target: "/sys/kernel/security", Type: "securityfs", Options: "nosuid,nodev,noexec"},
	{Source: "debugfs", Target: "/sys/kernel/debug", Type: "debugfs", Options: "nosuid,nodev,noexec"},
	{Source: "tracefs", Target: "/sys/kernel/tracing", Type: "tracefs", Options: "nosuid,nodev,noexec"},
	{Source: "configfs", Target: "/sys/kernel/config", Type: "configfs", Options: "nosuid,nodev,noexec"},
	{Source: "fusectl", Target: "/sys/fs/fuse/connections", Type: "fusectl", Options: "nosuid,nodev,noexec"},
}

// prepareUserspace gives the command what a booted system has. What the kernel
// lacks is left out.
func (in *initProcess) prepareUserspace() {
	known := knownFilesystems()
	for _, m := range systemMounts {
		if !known[m.Type] {
			continue // mounting it could load a module that nobody asked for
		}
		_ = os.Mkdir(m.Target, 0o755)
		_ = mountOne(m)
	}
	enableControllers("/sys/fs/cgroup")
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
		"core": "/proc/kcore", "rtc": "rtc0",
	} {
		if name == "rtc" && unix.Access("/dev/rtc0", unix.F_OK) != nil {
			continue
		}
		_ = os.Symlink(target, "/dev/"+name)
	}
	for name, value := range in.cfg.Settings {
		_ = os.WriteFile(name, []byte(value), 0)
	}
	setLimits()
	_ = os.Mkdir("/tmp", 0o777)
	_ = os.Chmod("/tmp", 0o777|os.ModeSticky)
	if unix.Access("/tmp", unix.W_OK) != nil { // read-only disk
		_ = mountOne(control.Mount{Source: "tmpfs", Target: "/tmp", Type: "tmpfs", Options: "nosuid,nodev,mode=1777", Optional: true})
	}
	_ = os.MkdirAll("/root", 0o700)
	loopbackUp()
	in.names()
}

// knownFilesystems are the types the kernel knows without loading anything.
func knownFilesystems() map[string]bool {
	b, _ := os.ReadFile("/proc/filesystems")
	known := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 {
			known[f[len(f)-1]] = true
		}
	}
	return known
}

// enableControllers makes all of a control group's controllers available to the
// groups below it.
func enableControllers(group string) {
	b, _ := os.ReadFile(filepath.Join(group, "cgroup.controllers"))
	for _, c := range strings.Fields(string(b)) {
		_ = os.WriteFile(filepath.Join(group, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

// setLimits sets the limits of resources that systemd sets; the kernel's own
// for what PID 1 starts are 4096 files and, before 5.16, 64 KiB of locked memory.
func setLimits() {
	_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: 512 << 10})
	_ = unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 8 << 20, Max: 8 << 20})
}

// loopbackUp switches the lo interface on; the kernel gives it its addresses.
func loopbackUp() {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil || unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, req) != nil {
		return
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	_ = unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req)
}

// etcFiles are what programs look names up in.
var etcFiles = [...]struct{ path, text string }{
	{"/etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"},
	{"/etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"},
	{"/etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"},
}

// names gives the machine what it is called by. Files are added only to a root
// file system that is gone with the guest.
func (in *initProcess) names() {
	scratch := in.cfg.Scratch || in.cfg.Root == nil
	if scratch {
		_ = os.Mkdir("/etc", 0o755)
		for _, f := range etcFiles {
			if _, err := os.Stat(f.path); err != nil {
				_ = os.WriteFile(f.path, []byte(f.text), 0o644)
			}
		}
	}
	if in.cfg.Hostname == "" {
		b, _ := os.ReadFile("/etc/hostname")
		_ = unix.Sethostname([]byte(hostnameOf(string(b))))
	}
	giveMachineID("/etc/machine-id", "/run/machine-id", scratch)
}

// hostnameOf is the name in the text of an /etc/hostname, or localhost.
func hostnameOf(text string) string {
	for line := range strings.Lines(text) {
		name := strings.TrimSpace(line)
		if name == "" || name[0] == '#' {
			continue
		}
		if len(name) <= 64 && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' }) {
			return name
		}
		break
	}
	return "localhost"
}

// giveMachineID makes up a machine-id where there is none (machine-id(5)). That
// of a disk that stays is not written to: another file is mounted over it.
func giveMachineID(path, over string, scratch bool) {
	if b, err := os.ReadFile(path); err == nil && len(strings.TrimSpace(string(b))) == 32 {
		return
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id)
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // as a random UUID
	text := []byte(hex.EncodeToString(id) + "\n")
	if scratch && os.WriteFile(path, text, 0o444) == nil {
		return
	}
	if os.WriteFile(over, text, 0o444) == nil {
		_ = mountOne(control.Mount{Source: over, Target: path, Options: "bind"})
	}
}
