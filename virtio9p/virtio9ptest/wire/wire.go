// Package wire writes and reads single 9P2000.L messages, for tests that say
// what a well-behaved client never would.
package wire

import (
	"encoding/binary"
	"fmt"
)

// Message types.
const (
	Rlerror      = 7
	Tstatfs      = 8
	Tlopen       = 12
	Tlcreate     = 14
	Tsymlink     = 16
	Tmknod       = 18
	Trename      = 20
	Treadlink    = 22
	Tgetattr     = 24
	Tsetattr     = 26
	Txattrwalk   = 30
	Txattrcreate = 32
	Treaddir     = 40
	Tfsync       = 50
	Tlock        = 52
	Tgetlock     = 54
	Tlink        = 70
	Tmkdir       = 72
	Trenameat    = 74
	Tunlinkat    = 76
	Tversion     = 100
	Tauth        = 102
	Tattach      = 104
	Tflush       = 108
	Twalk        = 110
	Tread        = 116
	Twrite       = 118
	Tclunk       = 120
	Tremove      = 122
)

// NoTag and NoFID are the sentinels of the protocol.
const (
	NoTag = 0xffff
	NoFID = 0xffffffff
)

// Msg encodes a message. Fields are uint8, uint16, uint32, uint64, string
// (with its length), []string (with their number) and []byte (as it is).
func Msg(typ uint8, tag uint16, fields ...any) []byte {
	b := make([]byte, 4, 64)
	b = append(b, typ)
	b = binary.LittleEndian.AppendUint16(b, tag)
	str := func(s string) {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
		b = append(b, s...)
	}
	for _, f := range fields {
		switch f := f.(type) {
		case uint8:
			b = append(b, f)
		case uint16:
			b = binary.LittleEndian.AppendUint16(b, f)
		case uint32:
			b = binary.LittleEndian.AppendUint32(b, f)
		case uint64:
			b = binary.LittleEndian.AppendUint64(b, f)
		case string:
			str(f)
		case []string:
			b = binary.LittleEndian.AppendUint16(b, uint16(len(f)))
			for _, s := range f {
				str(s)
			}
		case []byte:
			b = append(b, f...)
		default:
			panic(fmt.Sprintf("wire: a field of type %T", f))
		}
	}
	binary.LittleEndian.PutUint32(b, uint32(len(b)))
	return b
}

// Version, Attach, Walk and the like are the messages tests use most.
func Version(msize uint32) []byte { return Msg(Tversion, NoTag, msize, "9P2000.L") }

// Attach asks for the root as fid.
func Attach(tag uint16, fid uint32) []byte {
	return Msg(Tattach, tag, fid, uint32(NoFID), "root", "", uint32(0))
}

// Walk asks for newfid, reached from fid by names.
func Walk(tag uint16, fid, newfid uint32, names ...string) []byte {
	if names == nil {
		names = []string{}
	}
	return Msg(Twalk, tag, fid, newfid, names)
}

// Open opens fid with the flags of open(2).
func Open(tag uint16, fid, flags uint32) []byte { return Msg(Tlopen, tag, fid, flags) }

// Read reads count bytes at off.
func Read(tag uint16, fid uint32, off uint64, count uint32) []byte {
	return Msg(Tread, tag, fid, off, count)
}

// Readdir reads count bytes of entries after the one with the cookie off.
func Readdir(tag uint16, fid uint32, off uint64, count uint32) []byte {
	return Msg(Treaddir, tag, fid, off, count)
}

// Write writes data at off.
func Write(tag uint16, fid uint32, off uint64, data []byte) []byte {
	return Msg(Twrite, tag, fid, off, uint32(len(data)), data)
}

// Clunk gives fid up.
func Clunk(tag uint16, fid uint32) []byte { return Msg(Tclunk, tag, fid) }

// Flush asks for the answer to oldtag.
func Flush(tag, oldtag uint16) []byte { return Msg(Tflush, tag, oldtag) }

// Getattr asks for the basic attributes of fid (P9_STATS_BASIC).
func Getattr(tag uint16, fid uint32) []byte { return Msg(Tgetattr, tag, fid, uint64(0x7ff)) }

// Reply is a message taken apart.
type Reply struct {
	Type uint8
	Tag  uint16
	Body []byte
}

// Parse takes b apart, which must be exactly one message.
func Parse(b []byte) (Reply, error) {
	if len(b) < 7 {
		return Reply{}, fmt.Errorf("a reply of %d bytes", len(b))
	}
	if n := binary.LittleEndian.Uint32(b); int(n) != len(b) {
		return Reply{}, fmt.Errorf("a reply of %d bytes that says it has %d", len(b), n)
	}
	return Reply{b[4], binary.LittleEndian.Uint16(b[5:]), b[7:]}, nil
}

// Errno is the error of an Rlerror, and 0 of any other reply.
func (r Reply) Errno() int {
	if r.Type != Rlerror || len(r.Body) < 4 {
		return 0
	}
	return int(binary.LittleEndian.Uint32(r.Body))
}

// Data is the payload of an Rread or Rreaddir.
func (r Reply) Data() []byte {
	if len(r.Body) < 4 {
		return nil
	}
	return r.Body[4:]
}

// Dirent is an entry of an Rreaddir.
type Dirent struct {
	Path   uint64 // of the qid
	Offset uint64
	Type   uint8
	Name   string
}

// Dirents takes an Rreaddir's payload apart.
func Dirents(b []byte) []Dirent {
	var ds []Dirent
	for len(b) >= 24 {
		n := int(binary.LittleEndian.Uint16(b[22:]))
		if len(b) < 24+n {
			break
		}
		ds = append(ds, Dirent{binary.LittleEndian.Uint64(b[5:]), binary.LittleEndian.Uint64(b[13:]), b[21], string(b[24 : 24+n])})
		b = b[24+n:]
	}
	return ds
}
