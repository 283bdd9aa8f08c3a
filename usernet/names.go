package usernet

import (
	"context"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

const (
	// minPin is how long an address stays a name's at least, maxPin at most.
	minPin, maxPin = time.Minute, time.Hour
	// askAgain is how often the names of the policy are asked for again because
	// the guest goes to an address that was not found for any of them.
	askAgain = 5 * time.Second
)

// pin is why a guest may go to an address.
type pin struct {
	name  string
	until time.Time
}

// names are the addresses that the names of a policy have. They are what this
// network was told, never what a guest says, and only public ones.
type names struct {
	n *Network

	mu    sync.Mutex
	pins  map[netip.Addr]pin
	asked time.Time // all names, last
	now   func() time.Time
}

func newNames(n *Network) *names {
	return &names{n: n, pins: map[netip.Addr]pin{}, now: time.Now}
}

// add notes the addresses in an answer for a name.
func (s *names) add(name string, addrs []netip.Addr, ttl time.Duration) {
	if len(s.n.cfg.Policy.named(name)) == 0 {
		return
	}
	now := s.now()
	until := now.Add(min(max(ttl, minPin), maxPin))
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range addrs {
		if _, ok := s.pins[a]; !ok && len(s.pins) >= maxPins {
			for k, p := range s.pins {
				if p.until.Before(now) {
					delete(s.pins, k)
				}
			}
			if len(s.pins) >= maxPins {
				return
			}
		}
		s.pins[a] = pin{name, until}
	}
}

// public says whether a name may lead to an address.
func (n *Network) public(a netip.Addr) bool {
	c, _ := classify(a)
	return c == classPublic && !n.cfg.self(a)
}

// lead says whether one of the policy's names has the address now. What was
// found some time ago is asked for again.
func (s *names) lead(ctx context.Context, to netip.AddrPort) bool {
	if s.n.cfg.Policy.Public || !s.n.public(to.Addr()) {
		return false
	}
	if known, ok := s.valid(to); ok {
		return true
	} else if known != "" {
		s.resolve(ctx, known)
		_, ok := s.valid(to)
		return ok
	}
	s.mu.Lock()
	recent := s.now().Sub(s.asked) < askAgain
	if !recent {
		s.asked = s.now()
	}
	s.mu.Unlock()
	if recent {
		return false
	}
	var wg sync.WaitGroup
	for i, r := range s.n.cfg.Policy.Allow {
		if r.Name != "" && !strings.HasPrefix(r.Name, "*.") && i < maxQueries {
			wg.Go(func() { s.resolve(ctx, r.Name) })
		}
	}
	wg.Wait()
	_, ok := s.valid(to)
	return ok
}

// valid says whether an address was found for a name that may be used with its
// port; name is one that was found, perhaps too long ago.
func (s *names) valid(to netip.AddrPort) (name string, ok bool) {
	s.mu.Lock()
	p, found := s.pins[to.Addr()]
	s.mu.Unlock()
	if !found {
		return "", false
	}
	for _, r := range s.n.cfg.Policy.named(p.name) {
		if (r.Port == 0 || r.Port == to.Port()) && s.now().Before(p.until) {
			return p.name, true
		}
	}
	return p.name, false
}

// resolve asks for a name's addresses, which are noted.
func (s *names) resolve(ctx context.Context, name string) {
	q, err := dnsmessage.NewName(name + ".")
	if err != nil {
		return
	}
	_, _ = s.n.ask(ctx, dnsmessage.Question{Name: q, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET})
}
