package e2e

import (
	"context"
	"io"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/guesttest"
	"github.com/moovm/moovm/usernet"
	"github.com/moovm/moovm/virtionet"
)

// lanServer sends 1 MiB to whoever connects, twice.
const lanServer = `
socket(L, PF_INET, SOCK_STREAM, 6); setsockopt(L, SOL_SOCKET, SO_REUSEADDR, 1);
bind(L, pack_sockaddr_in(80, INADDR_ANY)) or die $!; listen(L, 5);
for (1, 2) { accept(C, L) or die $!; print C "0123456789abcdef" x 65536; close(C); }`

// Two guests of a Go test share a LAN that loses packets, and the test reaches
// into one of them without a port of this machine's.
func TestNetworkGuests(t *testing.T) {
	needKVM(t)
	hub, err := virtionet.NewHub(1, virtionet.Faults{Loss: 0.05})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hub.Close() })
	networks := func(address string) func() ([]guest.Network, error) {
		return func() ([]guest.Network, error) {
			user, err := usernet.New(usernet.Config{})
			if err != nil {
				return nil, err
			}
			return []guest.Network{
				{
					Link: user, MAC: guest.MACAddress("user " + address), Gateway: usernet.RouterAddr(),
					Address: netip.PrefixFrom(usernet.GuestAddr(), usernet.Subnet().Bits()),
				},
				{Link: hub.Port(), MAC: guest.MACAddress("lan " + address), Address: netip.MustParsePrefix(address)},
			}, nil
		}
	}
	config := guesttest.Config{Kernels: []string{kernel}, Memory: 512 << 20, CPUs: 1}
	var guests []*guesttest.Machine
	for _, address := range []string{"10.9.0.1/24", "10.9.0.2/24"} {
		config.Networks = networks(address)
		guests = append(guests, guesttest.Start(t, config))
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		if r, err := guests[0].Run(ctx, "perl", "-MSocket", "-e", lanServer); err != nil || r.Status != 0 {
			t.Errorf("the server: %v, %+v", err, r)
		}
	})
	defer wg.Wait()
	want := strings.Repeat("0123456789abcdef", 65536)
	var got string
	for len(got) == 0 && ctx.Err() == nil { // until it listens
		c, err := guests[0].Dial(ctx, "tcp", ":80")
		if err != nil {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		b, err := io.ReadAll(c)
		c.Close()
		if got = string(b); err != nil || got != want {
			t.Errorf("%d bytes by Dial, %v", len(b), err)
		}
	}
	r, err := guests[1].Run(ctx, "bash", "-c", "cat </dev/tcp/10.9.0.1/80")
	if err != nil || r.Stdout != want {
		t.Errorf("%d bytes over the LAN: %v, %s", len(r.Stdout), err, r.Stderr)
	}
}
