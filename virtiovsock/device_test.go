package virtiovsock

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/virtiotest"
)

func TestGuestConnects(t *testing.T) {
	p := newPeer(t, Config{})
	l, err := p.d.Listen(52)
	if err != nil {
		t.Fatal(err)
	}
	c := p.accepted(l)
	if c.LocalAddr().String() != "2:52" || c.RemoteAddr().String() != "7:1000" {
		t.Errorf("%v, %v", c.LocalAddr(), c.RemoteAddr())
	}
	p.send(opData, 1000, 52, []byte("hello"))
	b := make([]byte, 10)
	if n, err := c.Read(b); err != nil || string(b[:n]) != "hello" {
		t.Errorf("%q, %v", b[:n], err)
	}
	written := make(chan error, 1)
	go func() {
		_, err := c.Write([]byte("answer"))
		written <- err
	}()
	if h, data := p.recv(); h.op != opData || string(data) != "answer" || h.fwdCnt != 5 || h.bufAlloc != bufferSize {
		t.Errorf("%+v, %q", h, data)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
	// Half closed, then closed.
	p.send(opShutdown, 1000, 52, nil, func(h *header) { h.flags = shutSend })
	if _, err := c.Read(b); err != io.EOF {
		t.Errorf("after the guest's last word: %v", err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Error(err)
	}
	if h := p.want(opShutdown); h.flags != shutSend {
		t.Errorf("%+v", h)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if h := p.want(opShutdown); h.flags != shutSend|shutReceive {
		t.Errorf("%+v", h)
	}
	p.send(opReset, 1000, 52, nil)
	p.quiet()
	if s := p.d.Stats(); s.Open != 0 || s.Connections != 1 || s.RxBytes != 5 || s.TxBytes != 6 {
		t.Errorf("%+v", s)
	}
	if _, err := c.Write(b); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

func TestDial(t *testing.T) {
	p := newPeer(t, Config{})
	c, port := p.dialed()
	p.send(opData, 99, port, []byte("x"))
	p.send(opShutdown, 99, port, nil, func(h *header) { h.flags = shutSend | shutReceive })
	p.want(opReset)
	b := make([]byte, 4)
	if n, err := c.Read(b); n != 1 || err != nil { // what came before is not lost
		t.Error(n, err)
	}
	if _, err := c.Read(b); err != io.EOF {
		t.Error(err)
	}
	if _, err := c.Write(b); err == nil {
		t.Error("written to a guest that does not read")
	}
	c.Close()
	p.quiet()
}

func TestDialFails(t *testing.T) {
	p := newPeer(t, Config{MaxConns: 1})
	done := make(chan error, 1)
	dial := func(ctx context.Context) {
		go func() {
			_, err := p.d.Dial(ctx, 99)
			done <- err
		}()
	}
	dial(t.Context())
	p.send(opReset, 99, p.want(opRequest).srcPort, nil)
	if err := <-done; !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	dial(ctx)
	p.want(opRequest)
	if _, err := p.d.Dial(t.Context(), 98); !errors.Is(err, ErrTooMany) {
		t.Error(err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	p.want(opReset)
	dial(t.Context())
	p.want(opRequest)
	p.d.Reset()
	if err := <-done; !errors.Is(err, ErrReset) {
		t.Error(err)
	}
	if _, err := p.d.Dial(t.Context(), 99); !errors.Is(err, ErrNotReady) {
		t.Error(err)
	}
	p.d.Close()
	if _, err := p.d.Dial(t.Context(), 99); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// What the guest must not do has the connection reset, or is refused if there
// is none. A header from another CID has no answer.
func TestWrongPackets(t *testing.T) {
	set := func(f func(*header)) []func(*header) { return []func(*header){f} }
	for name, x := range map[string]struct {
		op     uint16
		data   string
		change []func(*header)
		silent bool
	}{
		"an unknown operation":      {op: 8},
		"operation 0":               {op: 0},
		"a datagram":                {op: opData, change: set(func(h *header) { h.typ = 2 })},
		"a wrong length":            {op: opData, data: "xx", change: set(func(h *header) { h.length = 3 })},
		"a huge length":             {op: opData, data: "xx", change: set(func(h *header) { h.length = 1<<32 - 1 })},
		"data where none belong":    {op: opCreditUpdate, data: "xx"},
		"a second request":          {op: opRequest},
		"a second answer":           {op: opResponse},
		"more read than was sent":   {op: opCreditUpdate, change: set(func(h *header) { h.fwdCnt = 1 })},
		"another source":            {op: opData, data: "x", change: set(func(h *header) { h.srcCID = 8 }), silent: true},
		"a source of 64 bits":       {op: opData, data: "x", change: set(func(h *header) { h.srcCID = 1<<32 + 7 }), silent: true},
		"another destination":       {op: opData, data: "x", change: set(func(h *header) { h.dstCID = 3 }), silent: true},
		"a destination of 64 bits":  {op: opData, data: "x", change: set(func(h *header) { h.dstCID = 1<<32 + HostCID }), silent: true},
		"the hypervisor's own CID":  {op: opRequest, change: set(func(h *header) { h.dstCID = 0 }), silent: true},
		"data beyond the credit":    {op: opData, data: string(make([]byte, 4)), change: nil},
		"data behind the last word": {op: opData, data: "x"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPeer(t, Config{})
			c, port := p.dialed()
			switch name {
			case "data beyond the credit":
				for range bufferSize / maxPayload {
					p.send(opData, 99, port, make([]byte, maxPayload))
				}
			case "data behind the last word":
				p.send(opShutdown, 99, port, nil, func(h *header) { h.flags = shutSend })
			}
			p.send(x.op, 99, port, []byte(x.data), x.change...)
			if x.silent {
				p.quiet()
				if s := p.d.Stats(); s.Invalid != 1 || s.Open != 1 {
					t.Errorf("%+v", s)
				}
				return
			}
			if name == "a datagram" { // of another type: it is not this connection's
				p.want(opReset)
				return
			}
			p.want(opReset)
			if _, err := c.Write([]byte("x")); !errors.Is(err, ErrReset) {
				t.Errorf("write: %v", err)
			}
			if s := p.d.Stats(); s.Invalid == 0 || s.Open != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
	p := newPeer(t, Config{})
	for op := uint16(opRequest); op <= opCreditRequest; op++ {
		p.send(op, 5, 6, nil)
		if op == opReset { // never answered
			p.quiet()
			continue
		}
		if h := p.want(opReset); h.srcPort != 6 || h.dstPort != 5 {
			t.Errorf("operation %d: %+v", op, h)
		}
	}
}

// Nothing is sent for which the guest has no room.
func TestCredit(t *testing.T) {
	p := newPeer(t, Config{})
	const room = 1000
	alloc := func(h *header) { h.bufAlloc = room }
	c, port := p.dialed(alloc)
	want := make([]byte, 10*room)
	for i := range want {
		want[i] = byte(i * 7)
	}
	written := make(chan error, 1)
	go func() {
		_, err := c.Write(want)
		written <- err
	}()
	var got []byte
	for read := 0; len(got) < len(want); {
		h, data := p.recv()
		if h.op != opData || len(data) > room {
			t.Fatalf("%+v", h)
		}
		got = append(got, data...)
		if len(got)-read > room {
			t.Fatalf("%d bytes sent, %d read", len(got), read)
		}
		if len(got)-read == room {
			p.quiet()
			read = len(got)
			p.send(opCreditUpdate, 99, port, nil, alloc, func(h *header) { h.fwdCnt = uint32(read) })
			p.send(opCreditUpdate, 99, port, nil, alloc, func(h *header) { h.fwdCnt = uint32(read) - 10 }) // one that was overtaken
		}
	}
	if err := <-written; err != nil || !bytes.Equal(got, want) {
		t.Error(err)
	}
	p.send(opCreditRequest, 99, port, nil, func(h *header) { h.fwdCnt = uint32(len(got)) })
	if h := p.want(opCreditUpdate); h.bufAlloc != bufferSize || h.fwdCnt != 0 {
		t.Errorf("%+v", h)
	}
	// What is read here the guest is told.
	for range bufferSize / maxPayload {
		p.send(opData, 99, port, make([]byte, maxPayload), func(h *header) { h.fwdCnt = uint32(len(got)) })
	}
	if _, err := io.ReadFull(c, make([]byte, bufferSize)); err != nil {
		t.Fatal(err)
	}
	var last header
	for last.fwdCnt != bufferSize {
		last = p.want(opCreditUpdate)
	}
}

func TestDeadlines(t *testing.T) {
	p := newPeer(t, Config{})
	c, port := p.dialed(func(h *header) { h.bufAlloc = 0 })
	c.SetDeadline(time.Now().Add(time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	if _, err := c.Write(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	c.SetDeadline(time.Time{})
	p.send(opData, 99, port, []byte("x"))
	if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
		t.Error(n, err)
	}
}

func TestLimits(t *testing.T) {
	if _, err := New(Config{CID: 2}); err == nil {
		t.Error("the host's CID for a guest")
	}
	if _, err := New(Config{CID: 1<<32 - 1}); err == nil {
		t.Error("the CID that is any for a guest")
	}
	p := newPeer(t, Config{MaxConns: 3})
	l, err := p.d.Listen(52)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.d.Listen(52); !errors.Is(err, ErrPortInUse) {
		t.Error(err)
	}
	for i := range uint32(5) {
		p.send(opRequest, i, 52, nil)
		if h, _ := p.recv(); (h.op == opResponse) != (i < 3) {
			t.Errorf("connection %d: %+v", i, h)
		}
	}
	// Nobody has accepted them.
	l.Close()
	for range 3 {
		p.want(opReset)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if s := p.d.Stats(); s.Open != 0 || s.Refused != 2 {
		t.Errorf("%+v", s)
	}
}

// A guest that does not confirm that a connection was closed has it reset.
func TestCloseUnconfirmed(t *testing.T) {
	p := newPeer(t, Config{})
	p.d.confirm = time.Millisecond
	c, _ := p.dialed()
	c.Close()
	p.want(opShutdown)
	p.want(opReset)
	if s := p.d.Stats(); s.Open != 0 {
		t.Errorf("%+v", s)
	}
}

// An end that waits hears of the guest's reset.
func TestReset(t *testing.T) {
	p := newPeer(t, Config{})
	c, _ := p.dialed()
	done := make(chan error, 1)
	go func() {
		_, err := c.Read(make([]byte, 1))
		done <- err
	}()
	p.d.Reset()
	if err := <-done; !errors.Is(err, ErrReset) {
		t.Error(err)
	}
	p.quiet()
}

func TestConnect(t *testing.T) {
	ends := make(chan net.Conn, 1)
	p := newPeer(t, Config{Connect: func(port uint32) (net.Conn, error) {
		if port != 52 {
			return nil, errors.New("no")
		}
		a, b := net.Pipe()
		ends <- b
		return a, nil
	}})
	p.send(opRequest, 1, 51, nil)
	p.want(opReset)
	p.send(opRequest, 1, 52, nil)
	p.want(opResponse)
	b := <-ends
	p.send(opData, 1, 52, []byte("hi"))
	in := make([]byte, 2)
	if _, err := io.ReadFull(b, in); err != nil || string(in) != "hi" {
		t.Error(string(in), err)
	}
	b.Close()
	if h := p.want(opShutdown); h.flags != shutSend {
		t.Errorf("%+v", h)
	}
	p.send(opShutdown, 1, 52, nil, func(h *header) { h.flags = shutSend | shutReceive })
	p.want(opReset)
}

func TestUnix(t *testing.T) {
	p := newPeer(t, Config{})
	path := filepath.Join(t.TempDir(), "vm.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- p.d.ServeUnix(l) }()
	for _, bad := range []string{"CONNECT\n", "CONNECT x\n", "CONNECT -1\n", "GET / HTTP/1.1\n", "CONNECT 4294967296\n", "CONNECT 11111111111111111111111111111\n"} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, bad)
		if b, _ := io.ReadAll(c); len(b) > 0 {
			t.Errorf("%q: %q", bad, b)
		}
		c.Close()
	}
	type result struct {
		c   net.Conn
		err error
	}
	done := make(chan result, 1)
	dial := func() {
		c, err := DialUnix(t.Context(), path, 99)
		done <- result{c, err}
	}
	go dial()
	h := p.want(opRequest)
	p.send(opResponse, 99, h.srcPort, nil)
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	p.send(opData, 99, h.srcPort, []byte("hi"))
	b := make([]byte, 2)
	if _, err := io.ReadFull(r.c, b); err != nil || string(b) != "hi" {
		t.Error(string(b), err)
	}
	go dial()
	p.send(opReset, 99, nextRequest(p), nil)
	if r := <-done; r.err == nil {
		t.Error("connected to a port where nobody listens")
	}
	r.c.Close()
	l.Close()
	p.d.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// nextRequest is the port of the next connection that is asked for.
func nextRequest(p *peer) uint32 {
	for {
		if h, _ := p.recv(); h.op == opRequest {
			return h.srcPort
		}
	}
}

// transport has the device behind registers and queues.
type transport struct {
	*virtiotest.Driver
	t    *testing.T
	bufs map[uint16][]byte
}

func start(t *testing.T, d *Device) *transport {
	t.Helper()
	g := virtiotest.NewGuest(4 << 20)
	m, err := virtiotest.NewMMIO(d, g, mmio.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close(); d.Close() })
	return &transport{virtiotest.Start(t, m, g, virtiotest.RingFeatures, 16), t, map[uint16][]byte{}}
}

func (x *transport) post(queue, size int) {
	addr, b := x.Guest.Alloc(uint64(size), 8)
	head, err := x.Rings[queue].Add(virtiotest.Buf{Addr: addr, Len: uint32(size), Write: true})
	if err != nil {
		x.t.Fatal(err)
	}
	x.bufs[head] = b
	x.Kick(queue)
}

func (x *transport) recv() (header, []byte) {
	head, n := x.Wait(rxQueue)
	b := x.bufs[head][:n]
	return parseHeader(b), b[headerSize:]
}

func (x *transport) send(h header, data []byte) {
	addr, b := x.Guest.Alloc(uint64(headerSize+len(data)), 8)
	h.srcCID, h.dstCID, h.typ, h.length = 7, HostCID, typeStream, uint32(len(data))
	h.put(b)
	copy(b[headerSize:], data)
	bufs := []virtiotest.Buf{{Addr: addr, Len: headerSize}}
	if len(data) > 0 {
		bufs = append(bufs, virtiotest.Buf{Addr: addr + headerSize, Len: uint32(len(data))})
	}
	x.Do(txQueue, bufs...)
}

func TestQueues(t *testing.T) {
	d, err := New(Config{CID: 7})
	if err != nil {
		t.Fatal(err)
	}
	x := start(t, d)
	var cid [8]byte
	x.ReadConfig(0, cid[:])
	if x.DeviceID() != 19 || le.Uint64(cid[:]) != 7 {
		t.Errorf("device %d, CID %x", x.DeviceID(), cid)
	}
	l, err := d.Listen(52)
	if err != nil {
		t.Fatal(err)
	}
	x.post(rxQueue, headerSize) // too small for any data: given back
	if _, n := x.Wait(rxQueue); n != 0 {
		t.Errorf("%d bytes in a buffer that is too small", n)
	}
	for range 4 {
		x.post(rxQueue, headerSize+100)
	}
	x.send(header{srcPort: 1, dstPort: 52, op: opRequest, bufAlloc: 1 << 16}, nil)
	if h, _ := x.recv(); h.op != opResponse {
		t.Errorf("%+v", h)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { c.Write(bytes.Repeat([]byte("a"), 250)) })
	for _, n := range []int{100, 100, 50} {
		if h, data := x.recv(); h.op != opData || len(data) != n {
			t.Errorf("%+v with %d bytes, want %d", h, len(data), n)
		}
	}
	wg.Wait()
	x.send(header{srcPort: 1, dstPort: 52, op: opData, bufAlloc: 1 << 16, fwdCnt: 250}, []byte("back"))
	b := make([]byte, 10)
	if n, err := c.Read(b); err != nil || string(b[:n]) != "back" {
		t.Error(string(b[:n]), err)
	}
}

// After a restore the driver is told that its connections are gone.
func TestRestore(t *testing.T) {
	d, err := New(Config{CID: 7})
	if err != nil {
		t.Fatal(err)
	}
	s, err := d.State()
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "{", "[]"} {
		if d.SetState([]byte(bad)) == nil {
			t.Errorf("state %q was taken", bad)
		}
	}
	x := start(t, d)
	x.post(eventQueue, 8)
	if err := d.SetState(s); err != nil {
		t.Fatal(err)
	}
	if _, n := x.Wait(eventQueue); n != eventSize {
		t.Errorf("an event of %d bytes", n)
	}
}

// A guest that takes no answers is not served without bound.
func TestReplies(t *testing.T) {
	d, err := New(Config{CID: 7})
	if err != nil {
		t.Fatal(err)
	}
	x := start(t, d)
	addr, b := x.Guest.Alloc(headerSize, 8)
	header{srcCID: 7, dstCID: HostCID, srcPort: 1, dstPort: 2, typ: typeStream, op: opData}.put(b)
	for range maxReplies {
		x.Do(txQueue, virtiotest.Buf{Addr: addr, Len: headerSize})
	}
	if _, err := x.Rings[txQueue].Add(virtiotest.Buf{Addr: addr, Len: headerSize}); err != nil {
		t.Fatal(err)
	}
	x.Kick(txQueue)
	d.mu.Lock()
	n := len(d.replies)
	d.mu.Unlock()
	if n != maxReplies {
		t.Errorf("%d answers wait", n)
	}
	x.post(rxQueue, headerSize+1)
	if h, _ := x.recv(); h.op != opReset {
		t.Errorf("%+v", h)
	}
	x.Wait(txQueue) // goes on
}

// FuzzPackets gives the device packets of any kind, and uses the connections
// that come of it. Bounds hold, and nothing is sent without credit.
func FuzzPackets(f *testing.F) {
	pkt := func(op byte, host, guest, flags, alloc, fwd, data byte) []byte {
		return []byte{0, op, host, guest, flags, alloc, fwd, data}
	}
	f.Add(bytes.Join([][]byte{pkt(1, 52, 1, 0, 9, 0, 0), {1}, pkt(5, 52, 1, 0, 9, 0, 200), {2}, {3}, pkt(6, 52, 1, 0, 9, 3, 0), pkt(4, 52, 1, 3, 0, 0, 0)}, nil))
	f.Add(bytes.Join([][]byte{{4}, pkt(2, 0, 99, 0, 9, 0, 0), pkt(5, 0, 99, 0, 9, 0, 9), {5}, pkt(3, 0, 99, 0, 0, 0, 0), {6}}, nil))
	f.Fuzz(func(t *testing.T, script []byte) {
		d, err := New(Config{CID: 7, MaxConns: 4})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		d.Activate(0, nil)
		l, err := d.Listen(52)
		if err != nil {
			t.Fatal(err)
		}
		arg := func() byte {
			if len(script) == 0 {
				return 0
			}
			b := script[0]
			script = script[1:]
			return b
		}
		past, cancel := context.WithCancel(t.Context())
		cancel()
		var conns []*Conn
		p := make([]byte, headerSize+1000)
		for steps := 0; len(script) > 0 && steps < 200; steps++ {
			switch arg() % 8 {
			case 0:
				h := header{srcCID: 7, dstCID: HostCID, typ: typeStream, op: uint16(arg())}
				if h.dstPort = uint32(arg()); h.dstPort < 4 {
					h.dstPort += firstPort
				}
				h.srcPort, h.flags, h.bufAlloc, h.fwdCnt = uint32(arg()), uint32(arg()), uint32(arg())<<3, uint32(int32(int8(arg())))
				data := make([]byte, int(arg())*257%(maxPayload+1))
				h.length = uint32(len(data))
				d.packet(h, data)
			case 1:
				if len(l.waiting) > 0 {
					c, _ := l.Accept()
					conns = append(conns, c.(*Conn))
				}
			case 2:
				for _, c := range conns {
					c.SetReadDeadline(time.Unix(1, 0))
					c.Read(p[:100])
				}
			case 3:
				for _, c := range conns {
					c.SetWriteDeadline(time.Unix(1, 0))
					c.Write(p[:50])
				}
			case 4:
				d.Dial(past, uint32(arg()))
			case 5:
				for _, c := range conns {
					c.CloseWrite()
				}
			case 6:
				for _, c := range conns {
					c.Close()
				}
			case 7:
				if n := d.next(p); n > 0 {
					if h := parseHeader(p); h.dstCID != 7 || int(h.length) != n-headerSize {
						t.Fatalf("%+v of %d bytes", h, n)
					}
				}
			}
			d.mu.Lock()
			if len(d.conns) > 4 {
				t.Errorf("%d connections", len(d.conns))
			}
			for _, c := range d.conns {
				if len(c.in) > bufferSize || c.received-c.taken > bufferSize || int32(c.sent-c.peerN) < 0 {
					t.Errorf("%d bytes, %d received, %d read, %d sent, %d of it read", len(c.in), c.received, c.taken, c.sent, c.peerN)
				}
			}
			d.mu.Unlock()
		}
	})
}
