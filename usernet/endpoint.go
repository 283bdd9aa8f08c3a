package usernet

import (
	"encoding/binary"
	"sync"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/moovm/moovm/virtionet"
)

var be, le = binary.BigEndian, binary.LittleEndian

const (
	headerSize = virtionet.HeaderSize
	ethSize    = 14
	ethIPv4    = 0x0800
	ethARP     = 0x0806
)

// routerMAC is the address of everything but the guest.
func routerMAC() [6]byte { return [6]byte{0x02, 'm', 'o', 'o', 'v', 0x01} }

// endpoint is where the stack's packets become the guest's frames and the other
// way round: the stack knows nothing of Ethernet. What the stack sends is
// handed over at once: nothing waits here.
type endpoint struct {
	*channel.Endpoint // its queue is not used

	in     sync.RWMutex // held for reading while the stack is given a packet
	closed bool

	out     sync.RWMutex // held for reading while r is used
	r       virtionet.Receiver
	guest   [6]byte // its address; all zeros: not known yet
	ended   bool
	buffers sync.Pool // of *[]byte
}

func newEndpoint(mtu int) *endpoint {
	e := &endpoint{Endpoint: channel.New(1, uint32(mtu), "")}
	// The guest leaves checksums and segmentation to us, and we TCP's to it.
	e.LinkEPCapabilities = stack.CapabilityRXChecksumOffload
	e.SupportedGSOKind = stack.HostGSOSupported
	e.buffers.New = func() any {
		b := make([]byte, headerSize+ethSize+65536)
		return &b
	}
	return e
}

func (e *endpoint) attach(r virtionet.Receiver) error {
	e.out.Lock()
	defer e.out.Unlock()
	if e.r != nil || e.ended {
		return virtionet.ErrAttached
	}
	e.r = r
	r.SetLink(true)
	return nil
}

// close lets nothing pass any more, in both directions, and waits for what is
// passing.
func (e *endpoint) close() {
	e.in.Lock()
	e.closed = true
	e.in.Unlock()
	e.out.Lock()
	e.r, e.ended = nil, true
	e.out.Unlock()
}

// learn remembers the guest's address.
func (e *endpoint) learn(mac [6]byte) {
	e.out.RLock()
	known := e.guest == mac
	e.out.RUnlock()
	if !known {
		e.out.Lock()
		e.guest = mac
		e.out.Unlock()
	}
}

// WritePackets implements stack.LinkEndpoint: what the guest cannot take is
// lost.
func (e *endpoint) WritePackets(packets stack.PacketBufferList) (int, tcpip.Error) {
	list := packets.AsSlice()
	for _, p := range list {
		e.write(p)
	}
	return len(list), nil
}

func (e *endpoint) write(p *stack.PacketBuffer) {
	if p.Size() > 65535 || p.NetworkProtocolNumber != header.IPv4ProtocolNumber {
		return
	}
	bp := e.buffers.Get().(*[]byte)
	defer e.buffers.Put(bp)
	b := (*bp)[:headerSize+ethSize]
	clear(b)
	for _, s := range p.AsSlices() {
		b = append(b, s...)
	}
	ip := b[headerSize+ethSize:]
	if gso := p.GSOOptions; gso.Type == stack.GSOTCPv4 {
		l4 := int(gso.L3HdrLen)
		b[0] = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
		le.PutUint16(b[6:], uint16(ethSize+l4))
		le.PutUint16(b[8:], gso.CsumOffset)
		if tcpLen := len(ip) - l4; tcpLen > header.TCPMinimumSize {
			if data := len(ip) - l4 - int(header.TCP(ip[l4:]).DataOffset()); data > int(gso.MSS) {
				b[1] = 1 // VIRTIO_NET_HDR_GSO_TCPV4
				le.PutUint16(b[2:], uint16(len(b)-headerSize-data))
				le.PutUint16(b[4:], gso.MSS)
			}
		}
	}
	e.out.RLock()
	known := e.guest != [6]byte{}
	e.out.RUnlock()
	if !known { // the sender tries again
		e.whoHas(GuestAddr())
		return
	}
	e.out.RLock()
	defer e.out.RUnlock()
	if e.r == nil {
		return
	}
	router := routerMAC()
	eth := b[headerSize:]
	copy(eth, e.guest[:])
	copy(eth[6:], router[:])
	be.PutUint16(eth[12:], ethIPv4)
	e.r.Receive(b)
}

// frame sends a frame that is all there, to the guest or to all.
func (e *endpoint) frame(to [6]byte, typ uint16, payload []byte) {
	router := routerMAC()
	b := make([]byte, headerSize+ethSize, headerSize+60)
	eth := b[headerSize:]
	copy(eth, to[:])
	copy(eth[6:], router[:])
	be.PutUint16(eth[12:], typ)
	b = append(b, payload...)
	e.out.RLock()
	defer e.out.RUnlock()
	if e.r != nil {
		e.r.Receive(b)
	}
}
