package usernet

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// long is longer than anything takes here, on the slowest machine.
const long = 2 * time.Minute

// guestStack is a guest: a stack of its own, with Ethernet and ARP.
type guestStack struct {
	t     *testing.T
	n     *Network
	s     *stack.Stack
	link  *channel.Endpoint
	ether *ethernet.Endpoint
	wg    sync.WaitGroup
	end   context.CancelFunc
}

var guestMAC = [6]byte{0x02, 0, 0, 0, 0, 0x77}

func (g *guestStack) SetLink(bool) {}
func (g *guestStack) Receive(p []byte) bool {
	b := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(p[headerSize:])})
	g.link.InjectInbound(0, b)
	b.DecRef()
	return true
}

// plug makes a guest on n, which both end with the test.
func plug(t *testing.T, n *Network) *guestStack {
	t.Helper()
	g := &guestStack{t: t, n: n}
	g.link = channel.New(4096, 1500+ethSize, tcpip.LinkAddress(guestMAC[:]))
	g.link.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	g.ether = ethernet.New(g.link)
	g.s = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	sack := tcpip.TCPSACKEnabled(true)
	for _, err := range []tcpip.Error{
		g.s.SetTransportProtocolOption(tcp.ProtocolNumber, &sack),
		g.s.CreateNIC(1, g.ether),
		g.s.AddProtocolAddress(1, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFrom4(GuestAddr().As4()), PrefixLen: 24}}, stack.AddressProperties{}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	subnet, _ := tcpip.NewSubnet(tcpip.AddrFrom4([4]byte{10, 0, 2, 0}), tcpip.MaskFromBytes([]byte{255, 255, 255, 0}))
	g.s.SetRouteTable([]tcpip.Route{
		{Destination: subnet, NIC: 1},
		{Destination: header.IPv4EmptySubnet, Gateway: tcpip.AddrFrom4(RouterAddr().As4()), NIC: 1},
	})
	ctx, cancel := context.WithCancel(context.Background())
	g.end = cancel
	g.wg.Go(func() {
		for {
			p := g.link.ReadContext(ctx)
			if p == nil {
				return
			}
			b := make([]byte, headerSize)
			for _, s := range p.AsSlices() {
				b = append(b, s...)
			}
			p.DecRef()
			n.Send(b)
		}
	})
	if err := n.Attach(g); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.Close()
		g.s.Close()
		g.end()
		g.wg.Wait()
		g.s.Wait()
		g.link.Close()
	})
	return g
}

func full(s string) tcpip.FullAddress {
	a := netip.MustParseAddrPort(s)
	return tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom4(a.Addr().As4()), Port: a.Port()}
}

// dial is a connection of the guest's.
func (g *guestStack) dial(address string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), long)
	defer cancel()
	c, err := gonet.DialContextTCP(ctx, g.s, full(address), ipv4.ProtocolNumber)
	if err != nil {
		return nil, err
	}
	g.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(long))
	return c, nil
}

func (g *guestStack) listen(port uint16) net.Listener {
	g.t.Helper()
	l, err := gonet.ListenTCP(g.s, tcpip.FullAddress{NIC: 1, Port: port}, ipv4.ProtocolNumber)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { l.Close() })
	return l
}

func (g *guestStack) udp(address string) net.Conn {
	g.t.Helper()
	to := full(address)
	c, err := gonet.DialUDP(g.s, nil, &to, ipv4.ProtocolNumber)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(long))
	return c
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// world answers for the whole Internet: every address leads to one TCP and one
// UDP echo server on this machine's loopback.
type world struct {
	mu     sync.Mutex
	dialed []string
	tcp    string
	udp    string
}

func (w *world) dial(network, address string) (net.Conn, error) {
	w.mu.Lock()
	w.dialed = append(w.dialed, network+" "+address)
	w.mu.Unlock()
	if network == "udp4" {
		return net.Dial("udp4", w.udp)
	}
	return net.Dial("tcp4", w.tcp)
}

func newWorld(t *testing.T) *world {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	echo(&wg, l)
	wg.Go(func() {
		p := make([]byte, 65536)
		for {
			n, from, err := u.ReadFrom(p)
			if err != nil {
				return
			}
			u.WriteTo(p[:n], from)
		}
	})
	t.Cleanup(func() { l.Close(); u.Close(); wg.Wait() })
	return &world{tcp: l.Addr().String(), udp: u.LocalAddr().String()}
}

// echo answers every connection with what it says, until both have said all.
func echo(wg *sync.WaitGroup, l net.Listener) {
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
				if w, ok := c.(interface{ CloseWrite() error }); ok {
					w.CloseWrite()
				}
			})
		}
	})
}

func nowhere(netip.Addr) bool { return false }

// newNetwork is a network whose Internet is w.
func newNetwork(t *testing.T, w *world, c Config) *Network {
	t.Helper()
	if c.self == nil {
		c.self = nowhere
	}
	if w != nil {
		c.dial = w.dial
	}
	if c.Nameservers == nil {
		c.Nameservers = []netip.AddrPort{}
	}
	c.exchangeLimit, c.serverLimit = long, long
	n, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}
