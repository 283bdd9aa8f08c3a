package guestinit

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moovm/moovm/guest/control"
	"golang.org/x/sys/unix"
)

// networkWait is how long an interface may take to appear: its driver looks for
// it when it is loaded.
const networkWait = 10 * time.Second

// networks configures the network interfaces. What cannot be done is said; the
// command runs all the same.
func (in *initProcess) networks() {
	for _, n := range in.cfg.Networks {
		if err := configureNetwork(n); err != nil {
			in.line.warn(fmt.Sprintf("the network interface %s is not configured: %v", n.MAC, err))
		}
	}
}

func configureNetwork(n control.Network) error {
	var name string
	for deadline := time.Now().Add(networkWait); ; time.Sleep(10 * time.Millisecond) {
		if name = interfaceOf("/sys/class/net", n.MAC); name != "" {
			break
		}
		if time.Now().After(deadline) {
			return errors.New("there is none; is the kernel's virtio_net missing?")
		}
	}
	if err := configure(name, n.Address); err != nil {
		return err
	}
	if n.Gateway.Is4() {
		if err := addDefaultRoute(n.Gateway); err != nil {
			return fmt.Errorf("the route by %v: %w", n.Gateway, err)
		}
	}
	if n.DNS.IsValid() {
		if err := bindResolvConf("/run/moovm-resolv.conf", "/etc/resolv.conf", n.DNS); err != nil {
			return fmt.Errorf("/etc/resolv.conf: %w", err)
		}
	}
	return nil
}

// interfaceOf is the name of the interface with an address, as sysfs has it.
func interfaceOf(class, mac string) string {
	files, _ := filepath.Glob(filepath.Join(class, "*", "address"))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.EqualFold(strings.TrimSpace(string(b)), mac) {
			return filepath.Base(filepath.Dir(f))
		}
	}
	return ""
}

// configure gives an interface its address, if there is one, and brings it up
// (netdevice(7)).
func configure(name string, address netip.Prefix) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	do := func(request uint, set func(*unix.Ifreq) error) error {
		r, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		if err := set(r); err != nil {
			return err
		}
		return unix.IoctlIfreq(s, request, r)
	}
	if address.Addr().Is4() {
		mask := binary.BigEndian.AppendUint32(nil, ^uint32(0)<<(32-address.Bits()))
		if err := do(unix.SIOCSIFADDR, func(r *unix.Ifreq) error { return r.SetInet4Addr(address.Addr().AsSlice()) }); err != nil {
			return err
		}
		if err := do(unix.SIOCSIFNETMASK, func(r *unix.Ifreq) error { return r.SetInet4Addr(mask) }); err != nil {
			return err
		}
	}
	return do(unix.SIOCSIFFLAGS, func(r *unix.Ifreq) error { r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING); return nil })
}

// addDefaultRoute sends what belongs to no other network to a gateway
// (rtnetlink(7)).
func addDefaultRoute(gateway netip.Addr) error {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ne := binary.NativeEndian
	m := make([]byte, unix.SizeofNlMsghdr)
	ne.PutUint16(m[4:], unix.RTM_NEWROUTE)
	ne.PutUint16(m[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	m = append(m, unix.AF_INET, 0, 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST, 0, 0, 0, 0)
	m = ne.AppendUint16(m, 8)
	m = ne.AppendUint16(m, unix.RTA_GATEWAY)
	m = append(m, gateway.AsSlice()...)
	ne.PutUint32(m, uint32(len(m)))
	if err := unix.Sendto(s, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	p := make([]byte, 4096)
	l, _, err := unix.Recvfrom(s, p, 0)
	if err != nil {
		return err
	}
	if l < unix.SizeofNlMsghdr+4 || ne.Uint16(p[4:]) != unix.NLMSG_ERROR {
		return errors.New("the kernel's answer makes no sense")
	}
	if e := int32(ne.Uint32(p[unix.SizeofNlMsghdr:])); e != 0 {
		return unix.Errno(-e)
	}
	return nil
}

// bindResolvConf puts a file that names the server over at, which stays as it
// is on its disk.
func bindResolvConf(file, at string, server netip.Addr) error {
	if err := os.WriteFile(file, []byte("nameserver "+server.String()+"\n"), 0o644); err != nil {
		return err
	}
	return mountAt(control.Mount{Source: file, Target: at, Type: "none", Options: "bind"})
}
