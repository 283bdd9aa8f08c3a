// Package vhostmsg is the wire format of vhost-user, for both its sides
// (QEMU's docs/interop/vhost-user.rst).
package vhostmsg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// Type is the request code of a message.
type Type uint32

// Requests of the front-end.
const (
	GetFeatures         Type = 1
	SetFeatures         Type = 2
	SetOwner            Type = 3
	ResetOwner          Type = 4
	SetMemTable         Type = 5
	SetVringNum         Type = 8
	SetVringAddr        Type = 9
	SetVringBase        Type = 10
	GetVringBase        Type = 11
	SetVringKick        Type = 12
	SetVringCall        Type = 13
	SetVringErr         Type = 14
	GetProtocolFeatures Type = 15
	SetProtocolFeatures Type = 16
	GetQueueNum         Type = 17
	SetVringEnable      Type = 18
	SetBackendReqFD     Type = 21
	GetConfig           Type = 24
	SetConfig           Type = 25
	GetInflightFD       Type = 31
	SetInflightFD       Type = 32
	ResetDevice         Type = 34
	GetMaxMemSlots      Type = 36
	AddMemReg           Type = 37
	RemMemReg           Type = 38
	SetStatus           Type = 39
	GetStatus           Type = 40
)

// BackendConfigChange is the request of the back-end that tells about a new
// configuration space.
const BackendConfigChange Type = 2

var names = map[Type]string{
	GetFeatures: "GET_FEATURES", SetFeatures: "SET_FEATURES", SetOwner: "SET_OWNER", ResetOwner: "RESET_OWNER",
	SetMemTable: "SET_MEM_TABLE", SetVringNum: "SET_VRING_NUM", SetVringAddr: "SET_VRING_ADDR",
	SetVringBase: "SET_VRING_BASE", GetVringBase: "GET_VRING_BASE", SetVringKick: "SET_VRING_KICK",
	SetVringCall: "SET_VRING_CALL", SetVringErr: "SET_VRING_ERR", GetProtocolFeatures: "GET_PROTOCOL_FEATURES",
	SetProtocolFeatures: "SET_PROTOCOL_FEATURES", GetQueueNum: "GET_QUEUE_NUM", SetVringEnable: "SET_VRING_ENABLE",
	SetBackendReqFD: "SET_BACKEND_REQ_FD", GetConfig: "GET_CONFIG", SetConfig: "SET_CONFIG",
	GetInflightFD: "GET_INFLIGHT_FD", SetInflightFD: "SET_INFLIGHT_FD", ResetDevice: "RESET_DEVICE",
	GetMaxMemSlots: "GET_MAX_MEM_SLOTS", AddMemReg: "ADD_MEM_REG", RemMemReg: "REM_MEM_REG",
	SetStatus: "SET_STATUS", GetStatus: "GET_STATUS",
}

func (t Type) String() string {
	if s, ok := names[t]; ok {
		return s
	}
	return fmt.Sprintf("request %d", uint32(t))
}

// FeatureProtocol is the virtio feature bit that says there are protocol
// features.
const FeatureProtocol uint64 = 1 << 30

// Protocol features.
const (
	ProtoMQ          uint64 = 1 << 0
	ProtoReplyAck    uint64 = 1 << 3
	ProtoBackendReq  uint64 = 1 << 5
	ProtoConfig      uint64 = 1 << 9
	ProtoInflight    uint64 = 1 << 12
	ProtoResetDevice uint64 = 1 << 13
	ProtoMemSlots    uint64 = 1 << 15
	ProtoStatus      uint64 = 1 << 16
)

// Header flags.
const (
	flagVersion     = 1
	flagVersionMask = 3
	flagReply       = 4
	flagNeedReply   = 8

	headerSize = 12
	// MaxPayload bounds what a message may carry.
	MaxPayload = 4096
	// MaxFDs is the number of descriptors a message may carry.
	MaxFDs = 8
)

// VringFD is the payload of SET_VRING_KICK and its likes.
const (
	VringIndexMask = 0xff
	VringNoFD      = 1 << 8
)

// Message is one request or reply. FDs belong to whoever has the Message.
type Message struct {
	Type      Type
	NeedReply bool
	Reply     bool
	Payload   []byte
	FDs       []int
}

// CloseFDs closes the descriptors nobody has taken.
func (m *Message) CloseFDs() {
	for _, fd := range m.FDs {
		unix.Close(fd)
	}
	m.FDs = nil
}

// Conn sends and receives messages.
type Conn struct {
	C   *net.UnixConn
	buf [MaxPayload]byte
	oob [1024]byte
}

// ErrFormat says that what arrived is no message.
var ErrFormat = errors.New("malformed message")

// Read receives a message, whose payload is valid until the next Read. At the
// end of the connection it returns io.EOF.
func (c *Conn) Read(m *Message) error {
	*m = Message{}
	var h [headerSize]byte
	n, on, flags, _, err := c.C.ReadMsgUnix(h[:], c.oob[:])
	if on > 0 {
		m.FDs = parseFDs(c.oob[:on])
	}
	switch {
	case err != nil:
	case n == 0 && on == 0:
		err = io.EOF
	case flags&unix.MSG_CTRUNC != 0 || len(m.FDs) > MaxFDs:
		err = fmt.Errorf("%w: more than %d descriptors", ErrFormat, MaxFDs)
	default:
		err = c.readAll(h[n:])
	}
	if err == nil {
		m.Type = Type(binary.LittleEndian.Uint32(h[0:]))
		f, size := binary.LittleEndian.Uint32(h[4:]), binary.LittleEndian.Uint32(h[8:])
		m.NeedReply, m.Reply = f&flagNeedReply != 0, f&flagReply != 0
		switch {
		case f&flagVersionMask != flagVersion:
			err = fmt.Errorf("%w: %v with version %d", ErrFormat, m.Type, f&flagVersionMask)
		case size > MaxPayload:
			err = fmt.Errorf("%w: %v with %d bytes of payload", ErrFormat, m.Type, size)
		default:
			m.Payload = c.buf[:size]
			err = c.readAll(m.Payload)
		}
	}
	if err != nil {
		m.CloseFDs()
	}
	return err
}

// readAll reads the rest of a message that has begun.
func (c *Conn) readAll(p []byte) error {
	_, err := io.ReadFull(c.C, p)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: it ends early", ErrFormat)
	}
	return err
}

func parseFDs(oob []byte) (fds []int) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		if f, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, f...)
		}
	}
	return fds
}

// Write sends a message; its descriptors stay open here.
func (c *Conn) Write(m *Message) error {
	var oob []byte
	if len(m.FDs) > 0 {
		oob = unix.UnixRights(m.FDs...)
	}
	_, _, err := c.C.WriteMsgUnix(m.Bytes(), oob, nil)
	return err
}

// Bytes is the message without its descriptors.
func (m *Message) Bytes() []byte {
	b := make([]byte, headerSize, headerSize+len(m.Payload))
	f := uint32(flagVersion)
	if m.NeedReply {
		f |= flagNeedReply
	}
	if m.Reply {
		f |= flagReply
	}
	binary.LittleEndian.PutUint32(b[0:], uint32(m.Type))
	binary.LittleEndian.PutUint32(b[4:], f)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(m.Payload)))
	return append(b, m.Payload...)
}

// Region is a memory region as the front-end describes it.
type Region struct {
	Guest, Size, User, Offset uint64
}

// RegionSize is the size of an encoded Region.
const RegionSize = 32

// ParseRegion decodes the first RegionSize bytes of b.
func ParseRegion(b []byte) Region {
	le := binary.LittleEndian
	return Region{le.Uint64(b), le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint64(b[24:])}
}

// Append encodes r.
func (r Region) Append(b []byte) []byte {
	for _, v := range [...]uint64{r.Guest, r.Size, r.User, r.Offset} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return b
}
