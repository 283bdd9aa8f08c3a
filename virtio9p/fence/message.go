package fence

import (
	"bytes"
	"encoding/binary"
	"math"

	"github.com/hugelgupf/p9/linux"
)

// Message types of 9P2000.L (Linux include/net/9p/9p.h).
const (
	rlerror  = 7
	tlopen   = 12
	tlcreate = 14
	trename  = 20
	tgetattr = 24
	tsetattr = 26
	rsetattr = 27
	treaddir = 40
	tlock    = 52
	rlock    = 53
	trenamat = 74
	tunlink  = 76
	tversion = 100
	rversion = 101
	tauth    = 102
	tattach  = 104
	tflush   = 108
	rflush   = 109
	twalk    = 110
	tread    = 116
	rread    = 117
	twrite   = 118
	tclunk   = 120
	tremove  = 122
)

const (
	headerLen  = 7  // size[4] type[1] tag[2]
	rlerrorLen = 11 // header, ecode[4]: the least room any exchange must have
	payloadHdr = 11 // header, count[4] of Rread and Rreaddir
	twriteHdr  = 16 // fid[4] offset[8] count[4]
	ioHeader   = 24 // of a message besides its payload, as Linux counts (P9_IOHDRSZ)
	pageSize   = 4096

	maxNames   = 16   // MAXWELEM of the protocol
	maxName    = 255  // NAME_MAX
	maxString  = 4096 // PATH_MAX, for anything else that is a string
	maxBody    = 16 << 10
	qidLen     = 13
	noFID      = math.MaxUint32
	maxFileOff = math.MaxInt64
)

// shape is what a T-message looks like: the fields of its body and the length
// of its longest reply. A message without a shape is not passed on.
//
// Fields: f a fid, F a fid the message brings into being, 1 2 4 8 integers of
// that many bytes, n a file name, s a string, w the names of a walk.
type shape struct {
	body  string
	reply int
}

// shapes is the grammar. Replies of variable length (Rread, Rreaddir) are
// bounded by a clamped count instead; Rreadlink is checked when it comes.
var shapes = [256]shape{
	8:        {"f", headerLen + 60}, // Tstatfs
	tlopen:   {"f4", headerLen + qidLen + 4},
	tlcreate: {"fn444", headerLen + qidLen + 4},
	16:       {"fns4", headerLen + qidLen},   // Tsymlink
	18:       {"fn4444", headerLen + qidLen}, // Tmknod
	trename:  {"ffn", headerLen},
	22:       {"f", rlerrorLen},         // Treadlink
	tgetattr: {"f8", headerLen + 153},   // Tgetattr
	tsetattr: {"f444488888", headerLen}, // Tsetattr
	treaddir: {"f84", payloadHdr},
	50:       {"f", headerLen},             // Tfsync; Linux adds datasync[4]
	tlock:    {"f14884s", headerLen + 1},   // Tlock
	70:       {"ffn", headerLen},           // Tlink
	72:       {"fn44", headerLen + qidLen}, // Tmkdir
	trenamat: {"fnfn", headerLen},
	tunlink:  {"fn4", headerLen},
	tattach:  {"F4ss4", headerLen + qidLen},
	twalk:    {"fFw", headerLen + 2 + maxNames*qidLen},
	tread:    {"f84", payloadHdr},
	twrite:   {"f84", headerLen + 4},
	tclunk:   {"f", headerLen},
	tremove:  {"f", headerLen},
}

// message is a checked T-message.
type message struct {
	typ    uint8
	tag    uint16
	fids   [2]uint32 // the fids it names
	nfids  int
	newFID bool // the last of them is to be brought into being
	names  int  // names of a walk
}

// parse checks body, the private copy of what follows the tag, against the
// grammar. Bytes after the last field are allowed, as by every server: Linux
// sends an extra field with Tfsync.
func (m *message) parse(body []byte) error {
	m.nfids, m.newFID, m.names = 0, false, 0
	str := func(limit int, tooLong error) error {
		if len(body) < 2 {
			return linux.EINVAL
		}
		n := int(binary.LittleEndian.Uint16(body))
		if n > len(body)-2 {
			return linux.EINVAL
		}
		s := body[2 : 2+n]
		body = body[2+n:]
		if n > limit {
			return tooLong
		}
		if bytes.IndexByte(s, 0) >= 0 {
			return linux.EINVAL
		}
		return nil
	}
	for _, field := range []byte(shapes[m.typ].body) {
		switch field {
		case 'f', 'F':
			if len(body) < 4 {
				return linux.EINVAL
			}
			m.fids[m.nfids] = binary.LittleEndian.Uint32(body)
			m.nfids++
			m.newFID = field == 'F'
			body = body[4:]
		case 'n':
			if err := str(maxName, linux.ENAMETOOLONG); err != nil {
				return err
			}
		case 's':
			if err := str(maxString, linux.ENAMETOOLONG); err != nil {
				return err
			}
		case 'w':
			if len(body) < 2 {
				return linux.EINVAL
			}
			m.names = int(binary.LittleEndian.Uint16(body))
			body = body[2:]
			if m.names > maxNames {
				return linux.EINVAL
			}
			for range m.names {
				if err := str(maxName, linux.ENAMETOOLONG); err != nil {
					return err
				}
			}
		default:
			n := int(field - '0')
			if len(body) < n {
				return linux.EINVAL
			}
			body = body[n:]
		}
	}
	return nil
}

// replyRoom is the room the longest reply to m can take.
func (m *message) replyRoom() int {
	if m.typ == twalk {
		return headerLen + 2 + m.names*qidLen
	}
	return shapes[m.typ].reply
}

// alone reports whether m may only run while nothing else does.
func (m *message) alone() bool {
	switch m.typ {
	case trename, trenamat, tunlink, tremove:
		return true
	}
	return false
}

// changesFID reports whether m changes the state of fid i of its fids.
func (m *message) changesFID(i int) bool {
	switch m.typ {
	case tlopen, tlcreate, tclunk, tremove:
		return true
	}
	return m.newFID && i == m.nfids-1
}

// conflicts reports whether m and other use a fid that one of them changes.
func (m *message) conflicts(other *message) bool {
	for i := range m.nfids {
		for j := range other.nfids {
			if m.fids[i] == other.fids[j] && (m.changesFID(i) || other.changesFID(j)) {
				return true
			}
		}
	}
	return false
}
