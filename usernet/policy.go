package usernet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
)

// Policy says where a guest may go. The zero Policy is nowhere.
//
// Some addresses are never reached: this machine's loopback (but see Host),
// multicast, broadcast and reserved ones, the guest's own network. Special ones
// (private and link-local networks, services of clouds for their machines) and
// this machine's own are reached only when a Rule names them: a prefix
// that lies wholly in the special range, the very address otherwise. A name
// never leads to any of these, whatever its server answers.
type Policy struct {
	// Public allows all other addresses, and all names.
	Public bool
	// Allow is allowed too.
	Allow []Rule
	// Host opens this machine's loopback, as HostAddr and host.moovm.internal.
	Host bool
}

// Rule is one thing that a Policy allows: a prefix or a name.
type Rule struct {
	Prefix netip.Prefix
	// Name is a host's name, in lower case and without a dot at its end; with
	// "*." in front of it all names below it, and not itself.
	Name string
	// Port is the only port; 0 means all.
	Port uint16
}

// ParseRule reads ADDRESS, CIDR or NAME, each with a :PORT at its end if it is
// for one port only.
func ParseRule(s string) (Rule, error) {
	var r Rule
	where := s
	bad := func(why string) (Rule, error) {
		return Rule{}, fmt.Errorf("%q: %s; write ADDRESS, CIDR or NAME, with :PORT for one port only", s, why)
	}
	if strings.Count(s, ":") > 1 {
		return bad("there is no IPv6 in the guest's network")
	}
	if host, port, ok := strings.Cut(s, ":"); ok {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return bad("the port is no number from 1 to 65535")
		}
		where, r.Port = host, uint16(n)
	}
	if strings.Contains(where, "/") {
		p, err := netip.ParsePrefix(where)
		if err != nil || !p.Addr().Is4() {
			return bad("this is no prefix of IPv4 addresses")
		}
		if p != p.Masked() {
			return bad(fmt.Sprintf("%v has bits behind its prefix; did you mean %v?", p, p.Masked()))
		}
		r.Prefix = p
	} else if a, err := netip.ParseAddr(where); err == nil {
		r.Prefix = netip.PrefixFrom(a, 32)
	} else {
		r.Name = strings.ToLower(strings.TrimSuffix(where, "."))
		if !validName(strings.TrimPrefix(r.Name, "*.")) {
			return bad("this is neither an address nor a name")
		}
	}
	if err := r.check(); err != nil {
		return bad(err.Error())
	}
	return r, nil
}

// validName says whether s can be a host's name; what looks like an address
// in some notation is none.
func validName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 {
			return false
		}
		for _, c := range []byte(l) {
			if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				return false
			}
		}
	}
	last := labels[len(labels)-1]
	return last[0] >= 'a' && last[0] <= 'z' && !strings.HasPrefix(last, "0x")
}

func (r Rule) check() error {
	switch {
	case r.Prefix.IsValid() == (r.Name != ""):
		return errors.New("a rule has either a prefix or a name")
	case r.Name != "":
		if !validName(strings.TrimPrefix(r.Name, "*.")) {
			return fmt.Errorf("%q is no host's name", r.Name)
		}
		if under(r.Name, internalDomain) {
			return fmt.Errorf("names in %s are the network's own", internalDomain)
		}
		return nil
	case !r.Prefix.Addr().Is4():
		return errors.New("there is no IPv6 in the guest's network")
	}
	for _, p := range never() {
		if p.Contains(r.Prefix.Addr()) && r.Prefix.Bits() >= p.Bits() {
			if p.Addr() == netip.AddrFrom4([4]byte{127}) {
				return errors.New("this machine's loopback is opened by the option host, not by an address")
			}
			return fmt.Errorf("%v is never reached from a guest", p)
		}
	}
	return nil
}

func (p *Policy) check() error {
	for i, r := range p.Allow {
		if err := r.check(); err != nil {
			return fmt.Errorf("usernet: Policy.Allow[%d]: %w", i, err)
		}
	}
	return nil
}

func prefixes(s ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(s))
	for i := range s {
		out[i] = netip.MustParsePrefix(s[i]) // constants
	}
	return out
}

// never are addresses that no rule opens.
func never() []netip.Prefix {
	return append(prefixes("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "240.0.0.0/4"), Subnet())
}

// special are those that only a rule for them opens (RFC 6890), and the
// addresses at which clouds tell their machines secrets. The narrowest first.
func special() []netip.Prefix {
	return prefixes(
		"169.254.169.254/32",                     // most clouds
		"169.254.170.2/32", "169.254.169.123/32", // Amazon's containers, and its clock
		"100.100.100.200/32",                            // Alibaba
		"168.63.129.16/32",                              // Azure
		"192.0.0.192/32",                                // Oracle
		"169.254.0.0/16",                                // link-local
		"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", // private
		"100.64.0.0/10", // carriers' own
		"192.0.0.0/24", "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24",
		"192.88.99.0/24", "198.18.0.0/15",
	)
}

// class is what kind of address a guest asks for.
type class int

const (
	classPublic class = iota
	classSpecial
	classNever
)

// classify returns an address's class and, if it is special, its range.
func classify(a netip.Addr) (class, netip.Prefix) {
	if !a.Is4() {
		return classNever, netip.Prefix{}
	}
	for _, p := range never() {
		if p.Contains(a) {
			return classNever, p
		}
	}
	for _, p := range special() {
		if p.Contains(a) {
			return classSpecial, p
		}
	}
	return classPublic, netip.Prefix{}
}

// Reasons for a refusal.
var (
	errNever    = errors.New("no guest reaches this address")
	errSpecial  = errors.New("a special address that no rule names")
	errSelf     = errors.New("an address of this machine that no rule names")
	errNotNamed = errors.New("not allowed")
)

// byAddress decides on an address by itself, without names. An error of
// errNotNamed says that a name may still lead there.
func (p *Policy) byAddress(a netip.Addr, port uint16, self func(netip.Addr) bool) error {
	a = a.Unmap()
	c, within := classify(a)
	if c == classNever {
		return errNever
	}
	if self(a) {
		within = netip.PrefixFrom(a, a.BitLen())
	} else if c == classPublic && p.Public {
		return nil
	}
	for _, r := range p.Allow {
		if r.Name == "" && r.Prefix.Contains(a) && (r.Port == 0 || r.Port == port) &&
			(!within.IsValid() || r.Prefix.Bits() >= within.Bits()) {
			return nil
		}
	}
	switch {
	case c == classSpecial:
		return errSpecial
	case within.IsValid():
		return errSelf
	}
	return errNotNamed
}

// named returns the rules that a name matches.
func (p *Policy) named(name string) (rules []Rule) {
	for _, r := range p.Allow {
		if r.Name == name || strings.HasPrefix(r.Name, "*.") && strings.HasSuffix(name, r.Name[1:]) {
			rules = append(rules, r)
		}
	}
	return rules
}

func under(name, domain string) bool { return name == domain || strings.HasSuffix(name, "."+domain) }

// isSelf reports whether an address is one of this machine's: a socket to it
// would have the same address at both ends. Nothing is sent.
func isSelf(a netip.Addr) bool {
	c, err := net.Dial("udp4", net.JoinHostPort(a.String(), "9"))
	if err != nil {
		return false // there is no way to it at all
	}
	defer c.Close()
	local, ok := c.LocalAddr().(*net.UDPAddr)
	if !ok {
		return true
	}
	l := local.AddrPort().Addr().Unmap()
	return l == a || l.IsLoopback()
}
