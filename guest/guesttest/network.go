package guesttest

import (
	"context"
	"errors"
	"net"

	"github.com/moovm/moovm/guest"
)

// dialer is a link that reaches the guest without a port of this machine's:
// usernet.Network is one.
type dialer interface {
	Dial(ctx context.Context, network, address string) (net.Conn, error)
}

// openNetworks makes the interfaces of one boot.
func (m *Machine) openNetworks(r *running) ([]guest.Network, error) {
	if m.c.Networks == nil {
		return nil, nil
	}
	networks, err := m.c.Networks()
	for _, n := range networks {
		r.ends = append(r.ends, n.Link)
		if d, ok := n.Link.(dialer); ok && r.dialer == nil {
			r.dialer = d
		}
	}
	return networks, err
}

// Dial connects to a port of the guest's, ":80" say, over "tcp" or "udp", by
// the first of its networks that can do that: a usernet.Network. No port of this
// machine is opened. The connection ends with the guest.
func (m *Machine) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	m.mu.Lock()
	r := m.guest
	m.mu.Unlock()
	if r == nil || r.dialer == nil {
		return nil, errors.New("the guest has no network that leads into it; give Config.Networks one with a usernet.Network")
	}
	return r.dialer.Dial(ctx, network, address)
}
