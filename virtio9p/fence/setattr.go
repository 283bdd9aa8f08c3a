package fence

import (
	"encoding/binary"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
)

// In a Tgetattr for the server, P9_STATS_DATA_VERSION without P9_STATS_GEN says
// that the bits below are the low bits of the tag of a Tsetattr. Linux asks for
// neither alone, and from what others ask the session takes the first away.
const (
	standInBit = 1 << 13
	tokenMask  = 1<<12 - 1
)

// standIn makes r, a Tsetattr, a Tgetattr for the server. The server refuses
// the one, and not the other, where the file's name has gone (EINVAL), though a
// program may well truncate what it has unlinked and still holds open.
func (r *request) standIn() {
	r.attrs = r.body // parse has seen to its length
	body := binary.LittleEndian.AppendUint32(nil, r.fids[0])
	body = binary.LittleEndian.AppendUint64(body, standInBit|uint64(r.tag)&tokenMask)
	r.wire = append(make([]byte, headerLen), body...)
	r.body = r.wire[headerLen:]
	putHeader(r.wire, len(r.wire), tgetattr, r.tag)
}

// sameToken reports whether the server could not tell the stand-ins of r and
// other apart.
func (r *request) sameToken(other *request) bool {
	return r.typ == tsetattr && other.typ == tsetattr && (r.tag^other.tag)&tokenMask == 0
}

// setting is the Tsetattr that mask stands in for; nil if it does for none.
func (s *Session) setting(mask p9.AttrMask) *request {
	if !mask.DataVersion || mask.Gen {
		return nil
	}
	var token uint16
	for i, bit := range []bool{mask.Mode, mask.NLink, mask.UID, mask.GID, mask.RDev, mask.ATime, mask.MTime, mask.CTime, mask.INo, mask.Size, mask.Blocks, mask.BTime} {
		if bit {
			token |= 1 << i
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for high := range uint16((1<<16-1)/(tokenMask+1) + 1) {
		if r := s.inflight[high*(tokenMask+1)|token]; r != nil && r.typ == tsetattr {
			return r
		}
	}
	return nil
}

// GetAttr serves a Tgetattr, and a Tsetattr for which one stands in.
func (f exactFile) GetAttr(req p9.AttrMask) (p9.QID, p9.AttrMask, p9.Attr, error) {
	if r := f.s.setting(req); r != nil {
		r.setAttr(f.File)
		return p9.QID{}, p9.AttrMask{}, p9.Attr{}, nil
	}
	qid, mask, attr, err := f.File.GetAttr(req)
	return qid, mask, attr, exact(err)
}

// setAttr does what r asks for, and writes the whole reply.
func (r *request) setAttr(file p9.File) {
	r.answered = true
	err := error(linux.EFAULT) // what a panic leaves
	defer func() {
		if err != nil {
			r.failed(err)
			return
		}
		var b [headerLen]byte
		putHeader(b[:], headerLen, rsetattr, r.tag)
		r.x.Write(b[:])
	}()
	four := func(i int) uint32 { return binary.LittleEndian.Uint32(r.attrs[i:]) }
	eight := func(i int) uint64 { return binary.LittleEndian.Uint64(r.attrs[i:]) }
	has := func(bit int) bool { return four(4)>>bit&1 != 0 }
	err = file.SetAttr(p9.SetAttrMask{
		Permissions: has(0), UID: has(1), GID: has(2), Size: has(3), ATime: has(4), MTime: has(5), CTime: has(6),
		ATimeNotSystemTime: has(7), MTimeNotSystemTime: has(8),
	}, p9.SetAttr{
		Permissions: p9.FileMode(four(8)).Permissions(), UID: p9.UID(four(12)), GID: p9.GID(four(16)), Size: eight(20),
		ATimeSeconds: eight(28), ATimeNanoSeconds: eight(36), MTimeSeconds: eight(44), MTimeNanoSeconds: eight(52),
	})
}
