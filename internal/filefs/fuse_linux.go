package filefs

import "encoding/binary"

// The operations that mean something here (enum fuse_opcode).
const (
	opLookup      = 1
	opForget      = 2
	opGetattr     = 3
	opSetattr     = 4
	opOpen        = 14
	opRead        = 15
	opWrite       = 16
	opStatfs      = 17
	opRelease     = 18
	opFsync       = 20
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opFsyncdir    = 30
	opInterrupt   = 36
	opDestroy     = 38
	opBatchForget = 42
	opFallocate   = 43
	opLseek       = 46
	opSyncfs      = 50
)

const (
	versionMajor, versionMinor = 7, 31

	inHeaderSize  = 40
	outHeaderSize = 16
	// maxArgs holds the arguments of every operation here; the longest is a
	// name of 255 bytes with its NUL. maxReply holds every answer but data.
	maxArgs  = 256
	maxReply = 128

	rootNode = 1 // FUSE_ROOT_ID; file i is node firstFile+i
	// firstFile is the node of file 0.
	firstFile = 2

	// maxPages is how many pages of data a request may have, beside the
	// pieces that its headers take.
	maxPages = QueueSize - 8

	// What INIT offers.
	initAsyncRead      = 1 << 0
	initBigWrites      = 1 << 5
	initWritebackCache = 1 << 16
	initMaxPages       = 1 << 22

	// What SETATTR changes.
	setMode     = 1 << 0
	setUID      = 1 << 1
	setGID      = 1 << 2
	setSize     = 1 << 3
	setAtime    = 1 << 4
	setMtime    = 1 << 5
	setAtimeNow = 1 << 7
	setMtimeNow = 1 << 8

	fsyncData = 1 << 0
)

// decoder takes fields off a message, little-endian. Those beyond its end are 0
// and set short.
type decoder struct {
	b     []byte
	short bool
}

func (d *decoder) take(n int) []byte {
	if len(d.b) < n {
		d.b, d.short = nil, true
		return make([]byte, 8)[:n]
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

func (d *decoder) u32() uint32 { return binary.LittleEndian.Uint32(d.take(4)) }
func (d *decoder) u64() uint64 { return binary.LittleEndian.Uint64(d.take(8)) }

// encoder appends fields to a message.
type encoder struct{ b []byte }

func (e *encoder) u16(v uint16) { e.b = binary.LittleEndian.AppendUint16(e.b, v) }
func (e *encoder) u32(v uint32) { e.b = binary.LittleEndian.AppendUint32(e.b, v) }
func (e *encoder) u64(v uint64) { e.b = binary.LittleEndian.AppendUint64(e.b, v) }

// zeros appends n bytes.
func (e *encoder) zeros(n int) {
	for range n {
		e.b = append(e.b, 0)
	}
}
