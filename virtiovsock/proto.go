package virtiovsock

import (
	"encoding/binary"
	"fmt"
)

var le = binary.LittleEndian

// HostCID is the CID of this side; MinCID the first one that a guest can have,
// and MaxCID the last one.
const (
	HostCID = 2
	MinCID  = 3
	MaxCID  = 1<<32 - 2
)

const (
	rxQueue, txQueue, eventQueue = 0, 1, 2

	headerSize = 44 // of a packet (section 5.10.6)
	typeStream = 1
	// maxPayload is the longest packet that is sent and taken; Linux has the
	// same.
	maxPayload = 64 << 10

	eventReset = 0 // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
	eventSize  = 4
)

// Operations (section 5.10.6).
const (
	opRequest       = 1
	opResponse      = 2
	opReset         = 3
	opShutdown      = 4
	opData          = 5
	opCreditUpdate  = 6
	opCreditRequest = 7
)

// Flags of opShutdown: the sender will not receive, will not send.
const (
	shutReceive = 1
	shutSend    = 2
)

// header is a struct virtio_vsock_hdr.
type header struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	length           uint32
	typ, op          uint16
	flags            uint32
	bufAlloc, fwdCnt uint32
}

func parseHeader(p []byte) header {
	return header{
		srcCID: le.Uint64(p[0:]), dstCID: le.Uint64(p[8:]), srcPort: le.Uint32(p[16:]), dstPort: le.Uint32(p[20:]),
		length: le.Uint32(p[24:]), typ: le.Uint16(p[28:]), op: le.Uint16(p[30:]), flags: le.Uint32(p[32:]),
		bufAlloc: le.Uint32(p[36:]), fwdCnt: le.Uint32(p[40:]),
	}
}

func (h header) put(p []byte) {
	le.PutUint64(p[0:], h.srcCID)
	le.PutUint64(p[8:], h.dstCID)
	le.PutUint32(p[16:], h.srcPort)
	le.PutUint32(p[20:], h.dstPort)
	le.PutUint32(p[24:], h.length)
	le.PutUint16(p[28:], h.typ)
	le.PutUint16(p[30:], h.op)
	le.PutUint32(p[32:], h.flags)
	le.PutUint32(p[36:], h.bufAlloc)
	le.PutUint32(p[40:], h.fwdCnt)
}

// Addr is one end of a connection, a net.Addr.
type Addr struct{ CID, Port uint32 }

// Network is "vsock".
func (Addr) Network() string  { return "vsock" }
func (a Addr) String() string { return fmt.Sprintf("%d:%d", a.CID, a.Port) }
