package usernet

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// nameserver is a server whose answers the test changes.
type nameserver struct {
	addr netip.AddrPort

	mu    sync.Mutex
	names map[string][]string // addresses
	asked []string
	long  bool // UDP answers are cut off
}

func newNameserver(t *testing.T) *nameserver {
	t.Helper()
	u, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &nameserver{addr: netip.MustParseAddrPort(u.LocalAddr().String()), names: map[string][]string{}}
	l, err := net.Listen("tcp4", s.addr.String())
	if err != nil {
		u.Close()
		t.Skipf("the TCP port of a free UDP port is in use: %v; run the test again", err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		p := make([]byte, 65536)
		for {
			n, from, err := u.ReadFrom(p)
			if err != nil {
				return
			}
			if a := s.answer(p[:n], false); a != nil {
				u.WriteTo(a, from)
			}
		}
	})
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if q, err := readMessage(c); err == nil {
				a := s.answer(q, true)
				c.Write(append(be.AppendUint16(nil, uint16(len(a))), a...))
			}
			c.Close()
		}
	})
	t.Cleanup(func() { u.Close(); l.Close(); wg.Wait() })
	return s
}

func (s *nameserver) set(name string, addrs ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names[name] = addrs
}

func (s *nameserver) answer(query []byte, stream bool) []byte {
	var m dnsmessage.Message
	if m.Unpack(query) != nil || len(m.Questions) != 1 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	q := m.Questions[0]
	s.asked = append(s.asked, plainName(q.Name))
	m.Response = true
	addrs, ok := s.names[plainName(q.Name)]
	if !ok {
		m.RCode = dnsmessage.RCodeNameError
	}
	h := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}
	for _, a := range addrs {
		ip, err := netip.ParseAddr(a)
		switch {
		case err != nil:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(a + ".")}})
		case ip.Is4():
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: ip.As4()}})
		default:
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: ip.As16()}})
		}
	}
	if s.long && !stream {
		m.Truncated, m.Answers = true, nil
	}
	b, _ := m.Pack()
	return b
}

// rules are those of comma separated text: public, host, and what ParseRule
// takes.
func rules(t *testing.T, text string) (p Policy) {
	t.Helper()
	for _, s := range strings.Split(text, ",") {
		switch s {
		case "":
		case "public":
			p.Public = true
		case "host":
			p.Host = true
		default:
			r, err := ParseRule(s)
			if err != nil {
				t.Fatal(err)
			}
			p.Allow = append(p.Allow, r)
		}
	}
	return p
}

// TestPolicy is a table of what guests try. An attempt is an address, or a
// name, which is resolved as a guest does it and whose every address is tried.
func TestPolicy(t *testing.T) {
	const self = "93.184.216.99" // one of this machine's addresses
	for _, c := range []struct {
		policy, try string
		reaches     string // the address that is connected to in the end; empty: refused
	}{
		// Nothing allowed.
		{"", "1.2.3.4:80", ""},
		{"", "10.1.2.3:80", ""},
		{"", "127.0.0.1:80", ""},
		{"", "169.254.169.254:80", ""},
		{"", "10.0.2.3:80", ""}, // the host's address, without host
		{"", "10.0.2.2:53", ""}, // past the router's own server
		{"", "good.example:80", ""},
		{"", "8.8.8.8:53", ""}, // DNS to somebody else
		// All that is public.
		{"public", "1.2.3.4:80", "1.2.3.4:80"},
		{"public", "8.8.8.8:53", "8.8.8.8:53"},
		{"public", "good.example:443", "93.184.216.1:443"},
		{"public", "alias.example:443", "93.184.216.1:443"},
		{"public", "0.0.0.0:80", ""}, // Linux' other name for the loopback
		{"public", "0.1.2.3:80", ""},
		{"public", "127.0.0.1:80", ""},
		{"public", "127.0.0.53:53", ""},
		{"public", "127.255.255.254:80", ""},
		{"public", "10.1.2.3:80", ""},
		{"public", "172.16.0.1:80", ""},
		{"public", "172.31.255.255:80", ""},
		{"public", "172.32.0.1:80", "172.32.0.1:80"}, // just beside
		{"public", "192.168.0.1:80", ""},
		{"public", "100.64.0.1:80", ""},
		{"public", "100.100.100.200:80", ""},
		{"public", "169.254.169.254:80", ""},
		{"public", "169.254.170.2:80", ""},
		{"public", "169.254.1.1:80", ""},
		{"public", "168.63.129.16:80", ""},
		{"public", "192.0.0.192:80", ""},
		{"public", "198.18.0.1:80", ""},
		{"public", "192.88.99.1:80", ""},
		{"public", "224.0.0.1:80", ""},
		{"public", "239.255.255.250:1900", ""},
		{"public", "240.0.0.1:80", ""},
		{"public", "255.255.255.255:80", ""},
		{"public", "10.0.2.3:80", ""},
		{"public", "10.0.2.99:80", ""},
		{"public", self + ":22", ""},
		{"public", "[::1]:80", ""},
		{"public", "[::ffff:127.0.0.1]:80", ""},
		{"public", "[::ffff:169.254.169.254]:80", ""},
		{"public", "[::ffff:10.1.2.3]:80", ""},
		{"public", "[fe80::1]:80", ""},
		{"public", "[fd00:ec2::254]:80", ""},
		{"public", "[2606:4700::1]:80", ""}, // there is no IPv6
		// Names that lead where they must not.
		{"public", "loop.example:80", ""},
		{"public", "meta.example:80", ""},
		{"public", "private.example:80", ""},
		{"public", "zero.example:80", ""},
		{"public", "self.example:22", ""},
		{"public", "mapped.example:80", ""},
		{"public", "mixed.example:80", "93.184.216.2:80"},
		{"public", "host.moovm.internal:80", ""},
		{"public", "nobody.example:80", ""},
		// The host, asked for.
		{"host", "10.0.2.3:80", "127.0.0.1:80"},
		{"host", "host.moovm.internal:80", "127.0.0.1:80"},
		{"host", "127.0.0.1:80", ""},
		{"host", self + ":22", ""},
		{"host", "1.2.3.4:80", ""},
		// Addresses.
		{"1.2.3.0/24", "1.2.3.4:80", "1.2.3.4:80"},
		{"1.2.3.0/24", "1.2.4.4:80", ""},
		{"1.2.3.0/24:443", "1.2.3.4:443", "1.2.3.4:443"},
		{"1.2.3.0/24:443", "1.2.3.4:80", ""},
		{"1.2.3.0/24", "good.example:80", ""}, // names are not asked for
		{"0.0.0.0/0", "1.2.3.4:80", "1.2.3.4:80"},
		{"0.0.0.0/0", "10.1.2.3:80", ""}, // not named
		{"0.0.0.0/0", "127.0.0.1:80", ""},
		{"0.0.0.0/0", "169.254.169.254:80", ""},
		{"0.0.0.0/0", self + ":22", ""},
		{"10.0.0.0/7", "10.1.2.3:80", ""}, // more than the private network
		{"10.0.0.0/8", "10.1.2.3:80", "10.1.2.3:80"},
		{"10.0.0.0/8", "10.0.2.99:80", ""}, // the guest's own network
		{"10.1.2.3:5432", "10.1.2.3:5432", "10.1.2.3:5432"},
		{"10.1.2.3:5432", "10.1.2.3:22", ""},
		{"192.168.0.0/16", "10.1.2.3:80", ""},
		{"169.254.0.0/16", "169.254.1.1:80", "169.254.1.1:80"},
		{"169.254.0.0/16", "169.254.169.254:80", ""}, // named for itself only
		{"169.254.169.254", "169.254.169.254:80", "169.254.169.254:80"},
		{self + "/32", self + ":22", self + ":22"},
		{"93.184.216.0/24", self + ":22", ""},
		// Names.
		{"good.example", "good.example:80", "93.184.216.1:80"},
		{"good.example", "GOOD.Example:80", "93.184.216.1:80"},
		{"good.example", "93.184.216.1:80", "93.184.216.1:80"}, // asked for again
		{"good.example", "93.184.216.7:80", ""},
		{"good.example", "alias.example:80", ""},
		{"good.example", "other.example:80", ""},
		{"good.example", "sub.good.example:80", ""},
		{"good.example", "notgood.example:80", ""},
		{"good.example:443", "good.example:443", "93.184.216.1:443"},
		{"good.example:443", "good.example:80", ""},
		{"loop.example", "loop.example:80", ""},
		{"meta.example", "meta.example:80", ""},
		{"private.example", "private.example:80", ""},
		{"private.example", "10.1.2.3:80", ""},
		{"self.example", "self.example:22", ""},
		{"*.good.example", "sub.good.example:80", "93.184.216.3:80"},
		{"*.good.example", "good.example:80", ""},
	} {
		t.Run(c.policy+" "+c.try, func(t *testing.T) {
			s := newNameserver(t)
			for name, addrs := range map[string][]string{
				"good.example": {"93.184.216.1"}, "sub.good.example": {"93.184.216.3"}, "other.example": {"93.184.216.7"}, "notgood.example": {"93.184.216.8"},
				"alias.example": {"good.example", "93.184.216.1"},
				"loop.example":  {"127.0.0.1"}, "meta.example": {"169.254.169.254"}, "private.example": {"10.1.2.3"}, "zero.example": {"0.0.0.0"},
				"self.example": {self}, "mapped.example": {"::ffff:127.0.0.1"}, "mixed.example": {"10.1.2.3", "93.184.216.2", "127.0.0.1"},
			} {
				s.set(name, addrs...)
			}
			w := newWorld(t)
			n := newNetwork(t, w, Config{
				Policy: rules(t, c.policy), Nameservers: []netip.AddrPort{s.addr},
				self: func(a netip.Addr) bool { return a.String() == self },
			})
			for _, network := range []string{"tcp", "udp"} {
				w.dialed = nil
				for _, a := range n.try(t, c.try) {
					if conn, err := n.dial(network, a); err == nil {
						conn.Close()
					}
				}
				got := strings.Join(w.dialed, ", ")
				want := ""
				if c.reaches != "" {
					want = network + "4 " + c.reaches
				}
				if got != want {
					t.Errorf("%s: connected to %q, want %q", network, got, want)
				}
			}
		})
	}
}

// try returns the addresses that a guest learns.
func (n *Network) try(t *testing.T, to string) (out []netip.AddrPort) {
	t.Helper()
	if a, err := netip.ParseAddrPort(to); err == nil {
		return []netip.AddrPort{a}
	}
	name, port, _ := strings.Cut(to, ":")
	a := n.query(t, name, dnsmessage.TypeA)
	for _, r := range a.Answers {
		if b, ok := r.Body.(*dnsmessage.AResource); ok {
			out = append(out, netip.MustParseAddrPort(fmt.Sprintf("%v:%s", netip.AddrFrom4(b.A), port)))
		}
	}
	return out
}

// query asks as a guest does.
func (n *Network) query(t *testing.T, name string, typ dnsmessage.Type) (m dnsmessage.Message) {
	t.Helper()
	m.ID = 77
	m.Questions = []dnsmessage.Question{{Name: dnsmessage.MustNewName(name + "."), Type: typ, Class: dnsmessage.ClassINET}}
	q, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	a := n.answer(q, false)
	if err := m.Unpack(a); err != nil || m.ID != 77 || !m.Response {
		t.Fatalf("the answer for %s: %v, %+v", name, err, m.Header)
	}
	return m
}

// A name whose server changes its mind leads to what it says now, and never to
// what is not public.
func TestRebinding(t *testing.T) {
	s := newNameserver(t)
	w := newWorld(t)
	n := newNetwork(t, w, Config{Policy: rules(t, "good.example"), Nameservers: []netip.AddrPort{s.addr}, self: nowhere})
	now := time.Now()
	n.names.now = func() time.Time { return now }
	reach := func(to string) bool {
		c, err := n.dial("tcp", netip.MustParseAddrPort(to))
		if err == nil {
			c.Close()
		}
		return err == nil
	}
	s.set("good.example", "93.184.216.1")
	n.try(t, "good.example:80")
	if !reach("93.184.216.1:80") {
		t.Error("what the name says is not reached")
	}
	for _, a := range []string{"127.0.0.1", "169.254.169.254", "10.1.2.3"} {
		s.set("good.example", a)
		n.try(t, "good.example:80")
		if reach(a + ":80") {
			t.Errorf("%s is reached by a name", a)
		}
	}
	if !reach("93.184.216.1:80") {
		t.Error("what was found a moment ago is not reached any more")
	}
	s.set("good.example", "93.184.216.5")
	now = now.Add(maxPin)
	if reach("93.184.216.1:80") {
		t.Error("what the name does not say any more is reached for ever")
	}
	now = now.Add(askAgain)
	if !reach("93.184.216.5:80") {
		t.Error("what the name says now is not reached")
	}
}

func TestParseRuleRefused(t *testing.T) {
	for _, s := range []string{
		"", ":80", "1.2.3.4:0", "1.2.3.4:x", "1.2.3.4:65536", "1.2.3.4/33", "1.2.3.4/24", "1.2.3/24", "::1", "fe80::/10", "[::1]:80", "::ffff:1.2.3.4",
		"127.0.0.1", "127.0.0.0/8", "127.1", "0x7f000001", "2130706433", "0", "0.0.0.0", "224.0.0.1", "255.255.255.255", "10.0.2.15", "10.0.2.0/24",
		"a b", "a..b", "-", "exa_mple.0x7f", "host.moovm.internal", "*.moovm.internal", "moovm.internal", "*", "*.", "a.*.b", strings.Repeat("a", 64) + ".example", "1.2.3.4.5",
	} {
		if r, err := ParseRule(s); err == nil {
			t.Errorf("%q was taken for %+v", s, r)
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestDNS(t *testing.T) {
	s := newNameserver(t)
	s.set("good.example", "93.184.216.1", "2606:4700::1")
	n := newNetwork(t, newWorld(t), Config{Policy: Policy{Public: true, Host: true}, Nameservers: []netip.AddrPort{s.addr}, self: nowhere})
	g := plug(t, n)
	ask := func(c net.Conn, name string, typ dnsmessage.Type, stream bool) (m dnsmessage.Message) {
		t.Helper()
		m.ID = 5
		m.Questions = []dnsmessage.Question{{Name: dnsmessage.MustNewName(name + "."), Type: typ, Class: dnsmessage.ClassINET}}
		q, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		var a []byte
		if stream {
			c.Write(append(be.AppendUint16(nil, uint16(len(q))), q...))
			a, err = readMessage(c)
		} else {
			c.Write(q)
			a = make([]byte, 65536)
			var l int
			l, err = c.Read(a)
			a = a[:l]
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Unpack(a); err != nil {
			t.Fatal(err)
		}
		return m
	}
	u := g.udp("10.0.2.2:53")
	c, err := g.dial("10.0.2.2:53")
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name    string
		typ     dnsmessage.Type
		code    dnsmessage.RCode
		answers int
	}{
		{"good.example", dnsmessage.TypeA, 0, 1},
		{"good.example", dnsmessage.TypeAAAA, 0, 0},
		{"good.example", dnsmessage.TypeALL, dnsmessage.RCodeRefused, 0},
		{"none.example", dnsmessage.TypeA, dnsmessage.RCodeNameError, 0},
		{"host.moovm.internal", dnsmessage.TypeA, 0, 1},
		{"HOST.moovm.internal", dnsmessage.TypeAAAA, 0, 0},
		{"gateway.moovm.internal", dnsmessage.TypeA, 0, 1},
		{"else.moovm.internal", dnsmessage.TypeA, dnsmessage.RCodeNameError, 0},
	} {
		for _, stream := range []bool{false, true} {
			conn := u
			if stream {
				conn = c
			}
			if m := ask(conn, x.name, x.typ, stream); m.RCode != x.code || len(m.Answers) != x.answers || m.ID != 5 {
				t.Errorf("%s %v, stream %v: %v with %d answers", x.name, x.typ, stream, m.RCode, len(m.Answers))
			}
		}
	}
	// An answer that is too long for UDP on this machine's side comes by TCP.
	var many []string
	for i := range 60 {
		many = append(many, fmt.Sprintf("93.184.217.%d", i))
	}
	s.set("many.example", many...)
	s.mu.Lock()
	s.long = true
	s.mu.Unlock()
	if m := ask(u, "many.example", dnsmessage.TypeA, false); !m.Truncated || len(m.Answers) != 0 {
		t.Errorf("60 addresses in a datagram: %v, %d", m.Truncated, len(m.Answers))
	}
	if m := ask(c, "many.example", dnsmessage.TypeA, true); len(m.Answers) != 60 {
		t.Errorf("%d of 60 addresses", len(m.Answers))
	}
}

// Names that are not allowed are not asked for: they can carry data away.
func TestNamesLeak(t *testing.T) {
	s := newNameserver(t)
	n := newNetwork(t, newWorld(t), Config{Policy: rules(t, "good.example,1.2.3.4"), Nameservers: []netip.AddrPort{s.addr}, self: nowhere})
	for _, name := range []string{"secret.evil.example", "secret.good.example", "good.example.evil", "1.2.3.4.in-addr.arpa"} {
		if m := n.query(t, name, dnsmessage.TypeTXT); m.RCode != dnsmessage.RCodeRefused {
			t.Errorf("%s: %v", name, m.RCode)
		}
	}
	if len(s.asked) > 0 {
		t.Errorf("the nameserver was asked for %q", s.asked)
	}
}

func TestSystemNameservers(t *testing.T) {
	if s := systemNameservers("/nonexistent"); len(s) != 1 || s[0].String() != "127.0.0.1:53" {
		t.Error(s)
	}
}

func TestSelf(t *testing.T) {
	if !isSelf(netip.MustParseAddr("127.0.0.1")) || !isSelf(netip.MustParseAddr("127.9.9.9")) {
		t.Error("the loopback is not this machine")
	}
}
