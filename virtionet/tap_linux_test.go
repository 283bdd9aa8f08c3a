package virtionet_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtionet"
)

func TestTapNames(t *testing.T) {
	for _, name := range []string{"", strings.Repeat("x", 16)} {
		if _, err := virtionet.OpenTap(name); !errors.Is(err, unix.EINVAL) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// The kernel answers an ARP request that is sent into a tap interface of a
// network namespace of the test's own.
func TestTap(t *testing.T) {
	const inside = "VIRTIONET_TEST_TAP"
	if os.Getenv(inside) == "" {
		c := exec.Command(os.Args[0], "-test.run=^TestTap$", "-test.v")
		c.Env = append(os.Environ(), inside+"=1")
		c.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		}
		out, err := c.CombinedOutput()
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) {
			t.Skipf("needs user and network namespaces (sysctl kernel.unprivileged_userns_clone=1): %v", err)
		}
		if strings.Contains(string(out), "SKIP") {
			t.Skipf("%s", out)
		}
		if err != nil {
			t.Errorf("%v: %s", err, out)
		}
		return
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skipf("needs the tun module (modprobe tun): %v", err)
	}
	tap, err := virtionet.OpenTap("moo%d")
	if err != nil {
		t.Fatal(err)
	}
	raise(t, tap.Name())
	e := attach(t, tap)
	if err := tap.Attach(&end{}); !errors.Is(err, virtionet.ErrAttached) || !e.isUp() {
		t.Error(err, e.isUp())
	}
	p := virtiotest.Packet(60, 0)
	f := p[12:]
	clear(f)
	copy(f, "\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x02\x08\x06\x00\x01\x08\x00\x06\x04\x00\x01\x02\x00\x00\x00\x00\x02\x0a\x09\x00\x02\x00\x00\x00\x00\x00\x00\x0a\x09\x00\x01")
	virtiotest.Eventually(t, "an ARP reply", func() bool {
		tap.Send(p)
		for _, p := range e.packets() {
			if len(p) >= 12+42 && bytes.Equal(p[12+12:12+14], []byte{8, 6}) && p[12+21] == 2 && bytes.Equal(p[12+28:12+32], []byte{10, 9, 0, 1}) {
				return true
			}
		}
		return false
	})
	for range 2 {
		if err := tap.Close(); err != nil {
			t.Error(err)
		}
	}
}

// raise gives an interface the address 10.9.0.1 and sets it up.
func raise(t *testing.T, name string) {
	t.Helper()
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(s)
	ifr, _ := unix.NewIfreq(name)
	ifr.SetInet4Addr([]byte{10, 9, 0, 1})
	if err := unix.IoctlIfreq(s, unix.SIOCSIFADDR, ifr); err != nil {
		t.Fatal(err)
	}
	ifr, _ = unix.NewIfreq(name)
	ifr.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr); err != nil {
		t.Fatal(err)
	}
}
