package usernet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// A Forward is a TCP port of this machine that leads to one of the guest's.
type Forward struct {
	// Listen is where this machine listens; port 0 is any that is free.
	Listen netip.AddrPort
	// Port is the guest's.
	Port uint16
}

// ParseForward reads [ADDRESS:]PORT:GUESTPORT; the address is 127.0.0.1 unless
// one is given, and an IPv6 address is in brackets.
func ParseForward(s string) (Forward, error) {
	f := Forward{Listen: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)}
	bad := func(why string) (Forward, error) {
		return Forward{}, fmt.Errorf("%q: %s; write [ADDRESS:]PORT:GUESTPORT", s, why)
	}
	rest, guest, ok := cutLast(s, ":")
	if !ok {
		return bad("the guest's port is missing")
	}
	n, err := strconv.ParseUint(guest, 10, 16)
	if err != nil || n == 0 {
		return bad("the guest's port is no number from 1 to 65535")
	}
	f.Port = uint16(n)
	port := rest
	if host, p, ok := cutLast(rest, ":"); ok {
		inside, bracketed := strings.CutPrefix(host, "[")
		if bracketed {
			inside = strings.TrimSuffix(inside, "]")
		}
		a, err := netip.ParseAddr(inside)
		if err != nil || a.Is6() != bracketed {
			return bad("what is in front of the ports is no address")
		}
		f.Listen, port = netip.AddrPortFrom(a, 0), p
	}
	if n, err = strconv.ParseUint(port, 10, 16); err != nil {
		return bad("the port is no number from 0 to 65535")
	}
	f.Listen = netip.AddrPortFrom(f.Listen.Addr(), uint16(n))
	return f, nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+1:], true
}

func (f Forward) String() string {
	return fmt.Sprintf("%v:%d", f.Listen, f.Port)
}

// Open listens. That the port is in use, or not this user's to have, is said
// in one sentence.
func (f Forward) Open() (*net.TCPListener, error) {
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(f.Listen))
	if err == nil {
		return l, nil
	}
	why := err.Error()
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		why = "the port is in use; choose another, or 0 for any"
	case errors.Is(err, syscall.EACCES):
		why = "ports below 1024 are root's; choose another"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		why = "this is no address of this machine"
	}
	return nil, fmt.Errorf("forward %v: %s: %w", f, why, syscallError(err))
}

// syscallError is the innermost error, whose text the sentence has already.
func syscallError(err error) error {
	var e syscall.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}

// connectLimit is how long the guest may take to answer a connection that a
// Forward makes.
const connectLimit = 30 * time.Second

// Forward passes on the connections that l accepts to a port of the guest's,
// until l or the network is closed; both close the other's connections. It
// returns at once and closes l.
func (n *Network) Forward(l net.Listener, port uint16) error {
	if port == 0 {
		return errors.New("usernet: a forward to port 0 of the guest")
	}
	forget, err := n.track(l)
	if err != nil {
		return err
	}
	if !n.begin() {
		return errClosed
	}
	go func() {
		defer n.wg.Done()
		defer forget()
		defer l.Close()
		for {
			c, err := l.Accept()
			if isTemporary(err) {
				select { // too many open files, say
				case <-time.After(100 * time.Millisecond):
				case <-n.ctx.Done():
				}
				continue
			}
			if err != nil {
				return
			}
			if !n.begin() {
				c.Close()
				return
			}
			go func() {
				defer n.wg.Done()
				n.forward(c, port)
			}()
		}
	}()
	return nil
}

func isTemporary(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ECONNABORTED)
}

// forward passes on one connection.
func (n *Network) forward(c net.Conn, port uint16) {
	forget, err := n.track(c)
	if err != nil {
		return
	}
	defer forget()
	release, ok := take(n.conns)
	if !ok {
		c.Close()
		return
	}
	defer release()
	ctx, cancel := context.WithTimeout(n.ctx, connectLimit)
	defer cancel()
	from := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(RouterAddr().As4())}
	to := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(GuestAddr().As4()), Port: port}
	g, err := gonet.DialTCPWithBind(ctx, n.stack, from, to, ipv4.ProtocolNumber)
	if err != nil {
		if t, ok := c.(*net.TCPConn); ok {
			t.SetLinger(0) // refused there, refused here
		}
		c.Close()
		return
	}
	n.join(g, func() { g.Close() }, c)
}
