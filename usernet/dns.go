package usernet

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

const (
	internalDomain = "moovm.internal"
	hostName       = "host." + internalDomain
	routerName     = "gateway." + internalDomain
	guestName      = "guest." + internalDomain

	// exchangeLimit is how long all nameservers may take together, serverLimit
	// one of them.
	exchangeLimit, serverLimit = 10 * time.Second, 3 * time.Second
	maxAnswers                 = 64
	maxDatagram                = 512 // of an answer, when the guest did not say otherwise
	dnsIdle                    = 10 * time.Second
)

// systemNameservers are those of a resolv.conf(5); without any, this machine.
func systemNameservers(file string) (out []netip.AddrPort) {
	b, _ := os.ReadFile(file) // it need not be there
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" || len(out) == 3 {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			out = append(out, netip.AddrPortFrom(a, 53))
		}
	}
	if len(out) == 0 {
		out = append(out, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 53))
	}
	return out
}

// serveDNS answers on the router's port 53.
func (n *Network) serveDNS() error {
	at := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(RouterAddr().As4()), Port: 53}
	u, err := gonet.DialUDP(n.stack, &at, nil, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	l, err := n.Listen(":53")
	if err != nil {
		u.Close()
		return err
	}
	if _, err := n.track(u); err != nil {
		return err
	}
	n.wg.Go(func() { n.serveDatagrams(u) })
	n.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.wg.Go(func() { n.serveStream(c) })
		}
	})
	return nil
}

func (n *Network) serveDatagrams(u net.PacketConn) {
	p := make([]byte, 1<<16)
	for {
		l, from, err := u.ReadFrom(p)
		if err != nil {
			return
		}
		release, ok := take(n.queries)
		if !ok {
			continue // it asks again
		}
		query := append([]byte(nil), p[:l]...)
		n.wg.Go(func() {
			defer release()
			if answer := n.answer(query, false); answer != nil {
				_, _ = u.WriteTo(answer, from)
			}
		})
	}
}

func (n *Network) serveStream(c net.Conn) {
	defer c.Close()
	for {
		c.SetDeadline(time.Now().Add(dnsIdle))
		query, err := readMessage(c)
		if err != nil {
			return
		}
		release, ok := take(n.queries)
		if !ok {
			return
		}
		c.SetDeadline(time.Now().Add(dnsIdle + n.cfg.exchangeLimit))
		answer := n.answer(query, true)
		release()
		if answer == nil {
			return
		}
		if _, err := c.Write(append(be.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
			return
		}
	}
}

// readMessage reads a message with its length in front (RFC 1035, 4.2.2).
func readMessage(r io.Reader) ([]byte, error) {
	var l [2]byte
	if _, err := io.ReadFull(r, l[:]); err != nil {
		return nil, err
	}
	p := make([]byte, binary.BigEndian.Uint16(l[:]))
	_, err := io.ReadFull(r, p)
	return p, err
}

// answer is the answer to a guest's query; nil if it is none.
func (n *Network) answer(query []byte, stream bool) []byte {
	var p dnsmessage.Parser
	h, err := p.Start(query)
	if err != nil || h.Response {
		return nil
	}
	m := dnsmessage.Message{Header: dnsmessage.Header{
		ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, RecursionAvailable: true,
	}}
	pack := func(code dnsmessage.RCode) []byte {
		m.RCode = code
		b, err := m.Pack()
		if err != nil {
			return nil
		}
		return b
	}
	q, err := p.AllQuestions()
	switch {
	case err != nil:
		return pack(dnsmessage.RCodeFormatError)
	case h.OpCode != 0:
		return pack(dnsmessage.RCodeNotImplemented)
	case len(q) != 1 || q[0].Class != dnsmessage.ClassINET:
		return pack(dnsmessage.RCodeRefused)
	}
	m.Questions = q
	ctx, cancel := context.WithTimeout(n.ctx, n.cfg.exchangeLimit)
	defer cancel()
	code, err := n.lookUp(ctx, &m)
	if err != nil {
		code = dnsmessage.RCodeServerFailure
	}
	b := pack(code)
	if !stream && len(b) > datagramLimit(&p) {
		m.Truncated, m.Answers = true, nil
		b = pack(code)
	}
	return b
}

// datagramLimit is how long an answer may be, as the query's EDNS record says.
func datagramLimit(p *dnsmessage.Parser) int {
	if p.SkipAllAnswers() != nil || p.SkipAllAuthorities() != nil {
		return maxDatagram
	}
	for {
		h, err := p.AdditionalHeader()
		if err != nil {
			return maxDatagram
		}
		if h.Type == dnsmessage.TypeOPT {
			return min(max(int(h.Class), maxDatagram), 1232)
		}
		if p.SkipAdditional() != nil {
			return maxDatagram
		}
	}
}

// lookUp fills in the answers to m's question.
func (n *Network) lookUp(ctx context.Context, m *dnsmessage.Message) (dnsmessage.RCode, error) {
	q := m.Questions[0]
	name := plainName(q.Name)
	switch {
	case under(name, internalDomain):
		return n.ownName(name, m), nil
	case !n.cfg.Policy.Public && len(n.cfg.Policy.named(name)) == 0, q.Type == dnsmessage.TypeALL, q.Type == dnsmessage.TypeAXFR:
		n.log.Warn("the guest may not ask for this name", "name", name)
		return dnsmessage.RCodeRefused, nil
	case q.Type == dnsmessage.TypeAAAA:
		return dnsmessage.RCodeSuccess, nil // there is no IPv6: nobody shall try
	}
	a, err := n.ask(ctx, q)
	if err != nil {
		return 0, err
	}
	m.Answers = a.Answers
	return a.RCode, nil
}

func plainName(n dnsmessage.Name) string {
	return strings.ToLower(strings.TrimSuffix(n.String(), "."))
}

// ownName answers for the network's own names.
func (n *Network) ownName(name string, m *dnsmessage.Message) dnsmessage.RCode {
	var a netip.Addr
	switch {
	case name == hostName && n.cfg.Policy.Host:
		a = HostAddr()
	case name == routerName:
		a = RouterAddr()
	case name == guestName:
		a = GuestAddr()
	default:
		return dnsmessage.RCodeNameError
	}
	if q := m.Questions[0]; q.Type == dnsmessage.TypeA {
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Type: q.Type, Class: q.Class, TTL: 60},
			Body:   &dnsmessage.AResource{A: a.As4()},
		}}
	}
	return dnsmessage.RCodeSuccess
}

// ask asks this machine's nameservers. From the answer, addresses are removed
// to which a name may not lead; the others are noted.
func (n *Network) ask(ctx context.Context, q dnsmessage.Question) (*dnsmessage.Message, error) {
	ask := dnsmessage.Message{Header: dnsmessage.Header{ID: uint16(rand.Uint32()), RecursionDesired: true}, Questions: []dnsmessage.Question{q}}
	query, err := ask.Pack()
	if err != nil {
		return nil, err
	}
	last := errors.New("there is no nameserver")
	for _, server := range n.cfg.Nameservers {
		var m dnsmessage.Message
		if m, last = exchange(ctx, server, query, n.cfg.serverLimit); last == nil {
			n.filter(q, &m)
			return &m, nil
		}
	}
	return nil, last
}

// filter leaves in an answer what a guest may be told.
func (n *Network) filter(q dnsmessage.Question, m *dnsmessage.Message) {
	var addrs []netip.Addr
	ttl, kept := maxPin, m.Answers[:0]
	for _, r := range m.Answers[:min(len(m.Answers), maxAnswers)] {
		switch b := r.Body.(type) {
		case *dnsmessage.AResource:
			a := netip.AddrFrom4(b.A)
			if !n.public(a) {
				n.log.Warn("a name leads to an address that is not public", "name", plainName(q.Name), "address", a.String())
				continue
			}
			addrs = append(addrs, a)
			ttl = min(ttl, time.Duration(r.Header.TTL)*time.Second)
		case *dnsmessage.AAAAResource:
			continue
		}
		kept = append(kept, r)
	}
	m.Answers = kept
	n.names.add(plainName(q.Name), addrs, ttl)
}

// exchange asks one server, over TCP when the answer is too long otherwise.
func exchange(ctx context.Context, server netip.AddrPort, query []byte, limit time.Duration) (dnsmessage.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	m, err := exchangeBy(ctx, "udp", server, query)
	if err == nil && m.Truncated {
		m, err = exchangeBy(ctx, "tcp", server, query)
	}
	return m, err
}

func exchangeBy(ctx context.Context, network string, server netip.AddrPort, query []byte) (m dnsmessage.Message, err error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, network, server.String())
	if err != nil {
		return m, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	sent := query
	if network == "tcp" {
		sent = append(be.AppendUint16(nil, uint16(len(query))), query...)
	}
	if _, err := c.Write(sent); err != nil {
		return m, err
	}
	p := make([]byte, 1<<16)
	for {
		var answer []byte
		if network == "tcp" {
			answer, err = readMessage(c)
		} else {
			var l int
			l, err = c.Read(p)
			answer = p[:l]
		}
		if err != nil {
			return m, err
		}
		if m, err = answerTo(query, answer); err == nil || network == "tcp" {
			return m, err
		}
		// A datagram that is no answer to this: forged, or late.
	}
}

// answerTo parses an answer, and says whether it is one to the query.
func answerTo(query, answer []byte) (m dnsmessage.Message, err error) {
	var asked dnsmessage.Message
	if err := asked.Unpack(query); err != nil {
		return m, err
	}
	var p dnsmessage.Parser
	h, err := p.Start(answer)
	if err != nil {
		return m, err
	}
	q, err := p.AllQuestions()
	if err != nil {
		return m, err
	}
	if !h.Response || h.ID != asked.ID || len(q) != 1 || plainName(q[0].Name) != plainName(asked.Questions[0].Name) ||
		q[0].Type != asked.Questions[0].Type || q[0].Class != asked.Questions[0].Class {
		return m, errors.New("this is no answer to the query")
	}
	m.Header, m.Questions = h, q
	if m.Truncated {
		return m, nil
	}
	m.Answers, err = p.AllAnswers()
	return m, err
}
