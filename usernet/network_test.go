package usernet

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// exchange sends n random bytes to an echo, and checks what comes back.
func exchangeBytes(t *testing.T, c net.Conn, n int) {
	t.Helper()
	out := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(out)
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(out)
		if err == nil {
			err = c.(interface{ CloseWrite() error }).CloseWrite()
		}
		sent <- err
	}()
	in, err := io.ReadAll(c)
	if err != nil {
		t.Error(err)
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if sha256.Sum256(in) != sha256.Sum256(out) {
		t.Errorf("%d bytes came back from %d, and not the same", len(in), len(out))
	}
}

func TestTCPOut(t *testing.T) {
	w := newWorld(t)
	g := plug(t, newNetwork(t, w, Config{Policy: Policy{Public: true}}))
	c, err := g.dial("1.2.3.4:80")
	if err != nil {
		t.Fatal(err)
	}
	exchangeBytes(t, c, 4<<20)
	if len(w.dialed) != 1 || w.dialed[0] != "tcp4 1.2.3.4:80" {
		t.Errorf("connected to %q", w.dialed)
	}
}

func TestTCPRefused(t *testing.T) {
	w := newWorld(t)
	g := plug(t, newNetwork(t, w, Config{}))
	for _, to := range []string{"1.2.3.4:80", "169.254.169.254:80", "10.0.2.2:22", "192.168.1.1:1"} {
		if c, err := g.dial(to); err == nil {
			c.Close()
			t.Errorf("%s was reached", to)
		} else if !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %v", to, err)
		}
	}
	if len(w.dialed) > 0 {
		t.Errorf("connected to %q", w.dialed)
	}
}

func TestHost(t *testing.T) {
	w := newWorld(t)
	g := plug(t, newNetwork(t, nil, Config{Policy: Policy{Host: true}}))
	port := w.tcp[strings.LastIndex(w.tcp, ":"):]
	c, err := g.dial("10.0.2.3" + port)
	if err != nil {
		t.Fatal(err)
	}
	exchangeBytes(t, c, 100)
}

func TestUDP(t *testing.T) {
	w := newWorld(t)
	g := plug(t, newNetwork(t, w, Config{Policy: Policy{Public: true}}))
	c := g.udp("8.8.4.4:5000")
	p := make([]byte, 4096)
	for _, m := range []string{"one", "two", strings.Repeat("x", 3000)} {
		if _, err := c.Write([]byte(m)); err != nil {
			t.Fatal(err)
		}
		n, err := c.Read(p)
		if err != nil || string(p[:n]) != m {
			t.Fatalf("got %d bytes, %v", n, err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.dialed) != 1 || w.dialed[0] != "udp4 8.8.4.4:5000" {
		t.Errorf("connected to %q", w.dialed)
	}
}

// ping sends an echo request and waits for the reply, if one is to come.
func (g *guestStack) ping(to string) ([]byte, error) {
	var wq waiter.Queue
	e, ch := waiter.NewChannelEntry(waiter.ReadableEvents)
	wq.EventRegister(&e)
	defer wq.EventUnregister(&e)
	ep, terr := g.s.NewEndpoint(icmp.ProtocolNumber4, ipv4.ProtocolNumber, &wq)
	if terr != nil {
		return nil, errors.New(terr.String())
	}
	defer ep.Close()
	a := full(to + ":0")
	a.Port = 0
	if terr := ep.Connect(a); terr != nil {
		return nil, errors.New(terr.String())
	}
	m := make(header.ICMPv4, header.ICMPv4MinimumSize, 64)
	m.SetType(header.ICMPv4Echo)
	m = append(m, "ping"...)
	if _, terr := ep.Write(bytes.NewReader(m), tcpip.WriteOptions{}); terr != nil {
		return nil, errors.New(terr.String())
	}
	select {
	case <-ch:
	case <-time.After(long):
		return nil, errors.New("no answer")
	}
	var b bytes.Buffer
	if _, terr := ep.Read(&b, tcpip.ReadOptions{}); terr != nil {
		return nil, errors.New(terr.String())
	}
	return b.Bytes(), nil
}

func TestPing(t *testing.T) {
	g := plug(t, newNetwork(t, nil, Config{}))
	p, err := g.ping("10.0.2.2")
	if err != nil || header.ICMPv4(p).Type() != header.ICMPv4EchoReply || !bytes.HasSuffix(p, []byte("ping")) {
		t.Errorf("%x, %v", p, err)
	}
}

func TestDialListen(t *testing.T) {
	n := newNetwork(t, nil, Config{})
	g := plug(t, n)
	var wg sync.WaitGroup
	defer wg.Wait()
	inside := g.listen(80)
	defer inside.Close()
	echo(&wg, inside)
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	c, err := n.Dial(ctx, "tcp", ":80")
	if err != nil {
		t.Fatal(err)
	}
	exchangeBytes(t, c, 1<<20)
	c.Close()

	outside, err := n.Listen(":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	echo(&wg, outside)
	if c, err = g.dial("10.0.2.2:8080"); err != nil {
		t.Fatal(err)
	}
	exchangeBytes(t, c, 1<<20)

	for _, to := range []string{"1.2.3.4:80", "80", ":0", ":http", ":99999"} {
		if c, err := n.Dial(ctx, "tcp", to); err == nil {
			c.Close()
			t.Errorf("%s was dialed", to)
		}
	}
	if c, err := n.Dial(ctx, "tcp", ":81"); err == nil {
		c.Close()
		t.Error("somebody listens on port 81")
	}
}

func TestForward(t *testing.T) {
	n := newNetwork(t, nil, Config{})
	g := plug(t, n)
	var wg sync.WaitGroup
	defer wg.Wait()
	inside := g.listen(80)
	defer inside.Close()
	echo(&wg, inside)
	f, err := ParseForward("0:80")
	if err != nil {
		t.Fatal(err)
	}
	l, err := f.Open()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Forward(l, f.Port); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(long))
	exchangeBytes(t, c, 1<<20)

	again, err := ParseForward(fmt.Sprintf("%d:80", l.Addr().(*net.TCPAddr).Port))
	if err != nil {
		t.Fatal(err)
	}
	if l, err := again.Open(); err == nil {
		l.Close()
		t.Error("a port was opened twice")
	} else if !strings.Contains(err.Error(), "the port is in use; choose another") || !errors.Is(err, syscall.EADDRINUSE) {
		t.Error(err)
	}
}

func TestForwardRefused(t *testing.T) {
	n := newNetwork(t, nil, Config{})
	plug(t, n)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Forward(l, 80); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(long))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, syscall.ETIMEDOUT) {
		t.Errorf("nobody listens in the guest, and the connection says %v", err)
	}
}

func TestParseForward(t *testing.T) {
	for in, want := range map[string]string{
		"8080:80": "127.0.0.1:8080:80", "0.0.0.0:2222:22": "0.0.0.0:2222:22", "0:1": "127.0.0.1:0:1", "[::1]:8080:80": "[::1]:8080:80",
		"": "", "80": "", ":80": "", "80:": "", "80:0": "", "80:65536": "", "65536:80": "", "-1:80": "", "x:80": "", "host:1:2": "", "::1:1:2": "",
		"[127.0.0.1]:1:2": "", "1:2:3": "",
	} {
		f, err := ParseForward(in)
		switch {
		case want == "" && err == nil:
			t.Errorf("%q was taken for %v", in, f)
		case want != "" && (err != nil || f.String() != want):
			t.Errorf("%q: %v, %v", in, f, err)
		}
	}
}

// A guest that resets a connection has it reset, and no goroutine stays.
func TestReset(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w := &world{tcp: l.Addr().String()}
	n := newNetwork(t, w, Config{Policy: Policy{Public: true}})
	g := plug(t, n)
	// The host resets.
	c, err := g.dial("1.2.3.4:80")
	if err != nil {
		t.Fatal(err)
	}
	h, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	h.(*net.TCPConn).SetLinger(0)
	h.Close()
	if _, err := c.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the guest's end of a connection that was reset says %v", err)
	}
	// The guest's end goes away: the host's end hears of it.
	if c, err = g.dial("1.2.3.4:80"); err != nil {
		t.Fatal(err)
	}
	if h, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	c.Close()
	h.SetDeadline(time.Now().Add(long))
	if _, err := h.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the host's end of a connection that was closed says %v", err)
	}
}

// More connections than there may be are refused, and those that there are go
// on.
func TestLimit(t *testing.T) {
	w := newWorld(t)
	n := newNetwork(t, w, Config{Policy: Policy{Public: true}})
	g := plug(t, n)
	first, err := g.dial("1.2.3.4:80")
	if err != nil {
		t.Fatal(err)
	}
	for len(n.conns) < cap(n.conns) {
		n.conns <- struct{}{}
	}
	if c, err := g.dial("1.2.3.4:80"); err == nil {
		c.Close()
		t.Error("one connection too many")
	}
	exchangeBytes(t, first, 1000)
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{
		{MTU: 575}, {MTU: 65536}, {MTU: -1},
		{Policy: Policy{Allow: []Rule{{}}}},
		{Policy: Policy{Allow: []Rule{{Prefix: netip.MustParsePrefix("::/0")}}}},
		{Policy: Policy{Allow: []Rule{{Prefix: netip.MustParsePrefix("127.0.0.1/32")}}}},
		{Policy: Policy{Allow: []Rule{{Name: "1.2.3.4"}}}},
	} {
		if n, err := New(c); err == nil {
			n.Close()
			t.Errorf("%+v was taken", c)
		}
	}
}

// Close ends what goes on, whatever it is.
func TestClose(t *testing.T) {
	w := newWorld(t)
	n := newNetwork(t, w, Config{Policy: Policy{Public: true}})
	g := plug(t, n)
	c, err := g.dial("1.2.3.4:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u := g.udp("1.2.3.4:80")
	u.Write([]byte("x"))
	u.Read(make([]byte, 1))
	l, err := n.Listen(":1")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), long)
	defer cancel()
	done := make(chan error, 2)
	go func() {
		_, err := l.Accept()
		done <- err
	}()
	n.Close()
	if err := <-done; err == nil {
		t.Error("a listener of a closed network accepts")
	}
	if _, err := n.Dial(ctx, "tcp", ":80"); !errors.Is(err, errClosed) {
		t.Errorf("dial on a closed network: %v", err)
	}
	if _, err := n.Listen(":2"); err == nil {
		t.Error("listen on a closed network")
	}
	if err := n.Attach(g); err == nil {
		t.Error("a device was attached to a closed network")
	}
	n.Send(make([]byte, 100))
	n.Close()
}
