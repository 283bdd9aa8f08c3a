package usernet

import (
	"context"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// target is where a packet of the guest's goes to.
func target(id stack.TransportEndpointID) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(id.LocalAddress.As4()), id.LocalPort)
}

// permit decides whether the guest may go to an address, and returns the one
// to connect to. It may have to ask for names again.
func (n *Network) permit(ctx context.Context, to netip.AddrPort) (netip.AddrPort, error) {
	switch a := to.Addr(); {
	case a == HostAddr() && n.cfg.Policy.Host:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), to.Port()), nil
	case Subnet().Contains(a):
		return to, errNever
	}
	err := n.cfg.Policy.byAddress(to.Addr(), to.Port(), n.cfg.self)
	if err == errNotNamed && n.names.lead(ctx, to) {
		err = nil
	}
	return to, err
}

// dial connects to where the guest wants to go, if it may.
func (n *Network) dial(network string, to netip.AddrPort) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(n.ctx, n.cfg.exchangeLimit)
	defer cancel()
	addr, err := n.permit(ctx, to)
	if err != nil {
		n.refused(network, to, err)
		return nil, err
	}
	return n.cfg.dial(network+"4", net.JoinHostPort(addr.Addr().String(), strconv.Itoa(int(addr.Port()))))
}

// connectTCP is called, on a goroutine of its own, for a connection that the
// guest makes to anybody but a Listen.
func (n *Network) connectTCP(r *tcp.ForwarderRequest) {
	if !n.begin() {
		r.Complete(false)
		return
	}
	defer n.wg.Done()
	release, ok := take(n.conns)
	if !ok {
		r.Complete(true)
		return
	}
	defer release()
	to := target(r.ID())
	if to.Addr() == RouterAddr() { // nobody listens there
		r.Complete(true)
		return
	}
	out, err := n.dial("tcp", to)
	if err != nil {
		r.Complete(true)
		return
	}
	forget, err := n.track(out)
	if err != nil {
		r.Complete(true)
		return
	}
	defer forget()
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	r.Complete(false)
	if terr != nil {
		out.Close()
		return
	}
	in := gonet.NewTCPConn(&wq, ep)
	n.join(in, ep.Abort, out)
}

// join passes on what two ends of a connection say until both have said all,
// or one of them breaks off; then so does the other. abort resets guest.
func (n *Network) join(guest net.Conn, abort func(), host net.Conn) {
	forget, err := n.track(guest)
	if err != nil {
		host.Close()
		return
	}
	defer forget()
	reset := sync.OnceFunc(func() {
		if c, ok := host.(*net.TCPConn); ok {
			c.SetLinger(0)
		}
		abort()
		host.Close()
	})
	var wg sync.WaitGroup
	one := func(to, from net.Conn) {
		if err := pass(to, from); err != nil {
			reset()
		}
	}
	wg.Go(func() { one(host, guest) })
	one(guest, host)
	wg.Wait()
	guest.Close()
	host.Close()
}

// pass copies until from ends, and tells to.
func pass(to, from net.Conn) error {
	if _, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, 32<<10)); err != nil {
		return err
	}
	if w, ok := to.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}
