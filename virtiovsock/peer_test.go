package virtiovsock

import (
	"context"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// long is longer than anything takes here, on the slowest machine.
const long = 2 * time.Minute

// peer is the guest's driver without queues: it calls what they call.
type peer struct {
	t *testing.T
	d *Device
	p []byte
}

func newPeer(t *testing.T, c Config) *peer {
	t.Helper()
	c.CID = 7
	d, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	d.confirm = long
	if err := d.Activate(0, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return &peer{t: t, d: d, p: make([]byte, headerSize+maxPayload)}
}

// recv is the next packet for the guest.
func (p *peer) recv() (header, []byte) {
	p.t.Helper()
	limit := time.After(long)
	for {
		if n := p.d.next(p.p); n > 0 {
			h := parseHeader(p.p)
			if h.srcCID != HostCID || h.dstCID != 7 || h.typ != typeStream || int(h.length) != n-headerSize {
				p.t.Fatalf("header %+v of %d bytes", h, n)
			}
			return h, p.p[headerSize:n]
		}
		select {
		case <-p.d.work:
		case <-limit:
			p.t.Fatal("no packet came")
		}
	}
}

// want is recv of a packet without data.
func (p *peer) want(op uint16) header {
	p.t.Helper()
	h, data := p.recv()
	if h.op != op || len(data) > 0 {
		p.t.Fatalf("got operation %d with %d bytes, want %d", h.op, len(data), op)
	}
	return h
}

// quiet says that there is no packet.
func (p *peer) quiet() {
	p.t.Helper()
	if n := p.d.next(p.p); n > 0 {
		p.t.Fatalf("an unexpected packet: %+v", parseHeader(p.p))
	}
}

// send sends a packet from a guest's port to one of the host's.
func (p *peer) send(op uint16, from, to uint32, data []byte, change ...func(*header)) {
	h := header{srcCID: 7, dstCID: HostCID, srcPort: from, dstPort: to, length: uint32(len(data)), typ: typeStream, op: op, bufAlloc: 1 << 20}
	for _, f := range change {
		f(&h)
	}
	p.d.packet(h, data)
}

// dialed is a connection that this side made to port 99.
func (p *peer) dialed(change ...func(*header)) (*Conn, uint32) {
	p.t.Helper()
	type result struct {
		c   *Conn
		err error
	}
	done := make(chan result, 1)
	go func() {
		ctx, cancel := context.WithTimeout(p.t.Context(), long)
		defer cancel()
		c, err := p.d.Dial(ctx, 99)
		if err != nil {
			done <- result{nil, err}
			return
		}
		done <- result{c.(*Conn), nil}
	}()
	h := p.want(opRequest)
	if h.dstPort != 99 {
		p.t.Fatalf("header %+v", h)
	}
	p.send(opResponse, 99, h.srcPort, nil, change...)
	r := <-done
	if r.err != nil {
		p.t.Fatal(r.err)
	}
	return r.c, h.srcPort
}

// accepted is a connection that the guest made.
func (p *peer) accepted(l *Listener) *Conn {
	p.t.Helper()
	p.send(opRequest, 1000, l.port, nil)
	p.want(opResponse)
	c, err := l.Accept()
	if err != nil {
		p.t.Fatal(err)
	}
	return c.(*Conn)
}
