package usernet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"github.com/moovm/moovm/virtionet"
)

const nic tcpip.NICID = 1

// Network is a guest's network, a virtionet.Link for its device. Its methods
// may be called from any goroutine.
type Network struct {
	cfg   Config
	log   *slog.Logger
	stack *stack.Stack
	port  *endpoint
	names *names

	conns   chan struct{} // a token for each TCP connection
	flows   chan struct{}
	queries chan struct{}

	ctx    context.Context // ends with the network
	cancel context.CancelFunc
	wg     sync.WaitGroup // all goroutines that use the stack

	mu     sync.Mutex
	closed bool
	open   map[io.Closer]struct{} // ends with the network
	denied map[netip.AddrPort]struct{}
}

// New returns a network that no device is plugged into.
func New(c Config) (*Network, error) {
	if err := c.setDefaults(); err != nil {
		return nil, err
	}
	n := &Network{
		cfg: c, log: c.Logger,
		conns: make(chan struct{}, maxConns), flows: make(chan struct{}, maxFlows), queries: make(chan struct{}, maxQueries),
		open: map[io.Closer]struct{}{}, denied: map[netip.AddrPort]struct{}{},
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	if n.cfg.dial == nil {
		n.cfg.dial = func(network, address string) (net.Conn, error) {
			d := net.Dialer{Timeout: 30 * time.Second, KeepAlive: -1}
			return d.DialContext(n.ctx, network, address)
		}
	}
	n.names = newNames(n)
	n.port = newEndpoint(c.MTU)
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if err := n.configure(); err != nil {
		n.Close()
		return nil, fmt.Errorf("usernet: %w", err)
	}
	return n, nil
}

func (n *Network) configure() error {
	sack, recovery := tcpip.TCPSACKEnabled(true), tcpip.TCPRecovery(0) // RACK loses throughput on links that reorder nothing
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4 << 10, Default: tcpBuffer / 2, Max: tcpBuffer}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: 4 << 10, Default: tcpBuffer / 2, Max: tcpBuffer}
	for _, o := range []tcpip.SettableTransportProtocolOption{&sack, &recovery, &receive, &send} {
		if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, o); err != nil {
			return errors.New(err.String())
		}
	}
	if err := n.stack.CreateNIC(nic, n.port); err != nil {
		return errors.New(err.String())
	}
	router := tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(RouterAddr().As4()), PrefixLen: 24}}
	if err := n.stack.AddProtocolAddress(nic, router, stack.AddressProperties{}); err != nil {
		return errors.New(err.String())
	}
	// The stack takes connections for, and answers with, every address: which
	// ones it gets to see is up to the frames' filter and the policy.
	n.stack.SetPromiscuousMode(nic, true)
	n.stack.SetSpoofing(nic, true)
	everything, err := tcpip.NewSubnet(tcpip.AddrFrom4([4]byte{}), tcpip.MaskFromBytes(make([]byte, 4)))
	if err != nil {
		return err
	}
	n.stack.SetRouteTable([]tcpip.Route{{Destination: everything, NIC: nic}})
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(n.stack, 0, maxDialing, n.connectTCP).HandlePacket)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(n.stack, n.connectUDP).HandlePacket)
	return n.serveDNS()
}

// Attach implements virtionet.Link.
func (n *Network) Attach(r virtionet.Receiver) error { return n.port.attach(r) }

// Offloads implements virtionet.Link.
func (n *Network) Offloads() virtionet.Offloads {
	return virtionet.Offloads{Checksum: true, Segmentation: true}
}

// Close implements virtionet.Link: it ends all connections and waits for what
// the network was doing.
func (n *Network) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	var open []io.Closer
	for c := range n.open {
		open = append(open, c)
	}
	n.mu.Unlock()
	n.port.close() // from here no frame comes in or goes out
	n.cancel()
	for _, c := range open {
		c.Close()
	}
	n.stack.Close()
	n.wg.Wait()
	n.stack.Wait()
	return nil
}

// track has c closed with the network, until the returned function is called.
func (n *Network) track(c io.Closer) (forget func(), err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		c.Close()
		return nil, errClosed
	}
	n.open[c] = struct{}{}
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		delete(n.open, c)
	}, nil
}

// begin counts a goroutine that uses the stack; false means that the network is
// closed. The caller says n.wg.Done.
func (n *Network) begin() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return false
	}
	n.wg.Add(1)
	return true
}

// guestEnd parses ":PORT" or "ADDRESS:PORT", with the guest's address.
func guestEnd(address string) (tcpip.FullAddress, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return tcpip.FullAddress{}, err
	}
	p, err := strconv.ParseUint(port, 10, 16)
	if err != nil || p == 0 {
		return tcpip.FullAddress{}, fmt.Errorf("port %q is no number from 1 to 65535", port)
	}
	if host != "" && host != "guest" && host != GuestAddr().String() {
		return tcpip.FullAddress{}, fmt.Errorf("%s is not the guest; leave the address out", host)
	}
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(GuestAddr().As4()), Port: uint16(p)}, nil
}

// Dial connects to a port of the guest's, ":80" say, over "tcp" or "udp". It
// comes from RouterAddr. The connection ends with the network.
func (n *Network) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, fmt.Errorf("usernet: dial %s %s in the guest: %w", network, address, err)
	}
	to, err := guestEnd(address)
	if err != nil {
		return fail(err)
	}
	if !n.begin() {
		return fail(errClosed)
	}
	defer n.wg.Done()
	from := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(RouterAddr().As4())}
	switch network {
	case "tcp", "tcp4":
		release, ok := take(n.conns)
		if !ok {
			return fail(fmt.Errorf("it has %d connections already", maxConns))
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(n.ctx, cancel)()
		c, err := gonet.DialTCPWithBind(ctx, n.stack, from, to, ipv4.ProtocolNumber)
		if err != nil {
			release()
			return fail(err)
		}
		return n.keep(c, release)
	case "udp", "udp4":
		release, ok := take(n.flows)
		if !ok {
			return fail(fmt.Errorf("it has %d flows already", maxFlows))
		}
		c, err := gonet.DialUDP(n.stack, &from, &to, ipv4.ProtocolNumber)
		if err != nil {
			release()
			return fail(err)
		}
		return n.keep(c, release)
	}
	return fail(errors.New("the network is tcp or udp"))
}

// Listen takes the connections that the guest makes to a TCP port of
// RouterAddr, ":8080" say. It ends with the network.
func (n *Network) Listen(address string) (net.Listener, error) {
	_, port, err := net.SplitHostPort(address)
	var p uint64
	if err == nil {
		p, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return nil, fmt.Errorf("usernet: listen %s for the guest: %w", address, err)
	}
	if !n.begin() {
		return nil, errClosed
	}
	defer n.wg.Done()
	l, err := gonet.ListenTCP(n.stack, tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(RouterAddr().As4()), Port: uint16(p)}, ipv4.ProtocolNumber)
	if err != nil {
		return nil, fmt.Errorf("usernet: listen %s for the guest: %w", address, err)
	}
	forget, err := n.track(l)
	if err != nil {
		return nil, err
	}
	return &listener{Listener: l, n: n, forget: forget}, nil
}

// listener is one whose connections are counted.
type listener struct {
	net.Listener
	n      *Network
	forget func()
}

func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		release, ok := take(l.n.conns)
		if !ok {
			c.Close()
			continue
		}
		return l.n.keep(c, release)
	}
}

func (l *listener) Close() error {
	l.forget()
	return l.Listener.Close()
}

// take takes a token, unless none is left; release gives it back, once.
func take(tokens chan struct{}) (release func(), ok bool) {
	select {
	case tokens <- struct{}{}:
		return sync.OnceFunc(func() { <-tokens }), true
	default:
		return nil, false
	}
}

// conn is a connection to or from the guest that counts.
type conn struct {
	net.Conn
	done func()
}

func (c *conn) Close() error {
	err := c.Conn.Close()
	c.done()
	return err
}

// CloseWrite ends what goes to the guest; reading goes on.
func (c *conn) CloseWrite() error {
	if w, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

// keep returns c as a connection that ends with the network.
func (n *Network) keep(c net.Conn, release func()) (net.Conn, error) {
	forget, err := n.track(c)
	if err != nil {
		release()
		return nil, err
	}
	return &conn{c, func() { forget(); release() }}, nil
}

// refused logs, once a destination, that the guest was not let there.
func (n *Network) refused(network string, to netip.AddrPort, why error) {
	n.mu.Lock()
	_, known := n.denied[to]
	if !known && len(n.denied) < maxDenied {
		n.denied[to] = struct{}{}
	}
	n.mu.Unlock()
	if !known {
		n.log.Warn("the guest may not connect", "network", network, "to", to.String(), "reason", why)
	}
}
