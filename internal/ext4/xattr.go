package ext4

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
)

const (
	xattrMagic    = 0xea020000
	inlineSpace   = inodeSize - 160
	maxXattrCount = 1000
)

// xattrs are the attributes of an inode as they are on disk.
type xattrs struct {
	inline []byte // in the inode
	block  []byte // or in a block of their own
	at     int64  // its number
}

type xattr struct {
	index       byte
	name, value string
}

// prefixes are how names are abbreviated; the longer ones first.
var prefixes = []struct {
	name  string
	index byte
}{
	{"system.posix_acl_access", 2}, {"system.posix_acl_default", 3},
	{"user.", 1}, {"trusted.", 4}, {"security.", 6}, {"system.", 7},
}

// packXattrs brings attributes into the form that they have on disk.
func packXattrs(m map[string][]byte) (xattrs, error) {
	if len(m) == 0 {
		return xattrs{}, nil
	}
	if len(m) > maxXattrCount {
		return xattrs{}, fmt.Errorf("%w: %d of them", ErrXattr, len(m))
	}
	list := make([]xattr, 0, len(m))
	for _, name := range slices.Sorted(maps.Keys(m)) {
		x := xattr{value: string(m[name])}
		for _, p := range prefixes {
			if rest, ok := strings.CutPrefix(name, p.name); ok && (p.index == 2 || p.index == 3) == (rest == "") {
				x.index, x.name = p.index, rest
				break
			}
		}
		if x.index == 0 || len(x.name) > 255 || strings.IndexByte(x.name, 0) >= 0 {
			return xattrs{}, fmt.Errorf("%w: no attribute is called %.80q", ErrXattr, name)
		}
		if x.index == 2 || x.index == 3 {
			v, ok := diskACL(x.value)
			if !ok {
				return xattrs{}, fmt.Errorf("%w: %s is no access control list", ErrXattr, name)
			}
			x.value = v
		}
		list = append(list, x)
	}
	slices.SortFunc(list, func(a, b xattr) int {
		return cmp.Or(cmp.Compare(a.index, b.index), cmp.Compare(len(a.name), len(b.name)), strings.Compare(a.name, b.name))
	})
	inline := make([]byte, inlineSpace)
	binary.LittleEndian.PutUint32(inline, xattrMagic)
	if _, ok := putXattrs(inline, 4, 4, list); ok {
		return xattrs{inline: inline}, nil
	}
	block := make([]byte, blockSize)
	hash, ok := putXattrs(block, 32, 0, list)
	if !ok {
		return xattrs{}, fmt.Errorf("%w: they are larger than a block of %d bytes", ErrXattr, blockSize)
	}
	for i, v := range []uint32{xattrMagic, 1, 1, hash} {
		binary.LittleEndian.PutUint32(block[4*i:], v)
	}
	return xattrs{block: block}, nil
}

// putXattrs writes entries from at on and values from b's end downwards, whose
// offsets count from base.
func putXattrs(b []byte, at, base int, list []xattr) (hash uint32, ok bool) {
	end := len(b)
	le := binary.LittleEndian
	for _, x := range list {
		size := 16 + (len(x.name)+3)&^3
		room := (len(x.value) + 3) &^ 3
		if at+size+4 > end-room {
			return 0, false
		}
		end -= room
		copy(b[end:], x.value)
		b[at], b[at+1] = byte(len(x.name)), x.index
		if room > 0 {
			le.PutUint16(b[at+2:], uint16(end-base))
		}
		le.PutUint32(b[at+8:], uint32(len(x.value)))
		h := uint32(0)
		for i := range len(x.name) {
			h = h<<5 ^ h>>27 ^ uint32(int32(int8(x.name[i])))
		}
		for v := b[end : end+room]; len(v) > 0; v = v[4:] {
			h = h<<16 ^ h>>16 ^ le.Uint32(v)
		}
		le.PutUint32(b[at+12:], h)
		copy(b[at+16:], x.name)
		at += size
		hash = hash<<16 ^ hash>>16 ^ h
	}
	return hash, true
}

// diskACL turns an access control list from the form of system calls into the
// one on disk, where only named users and groups have a number.
func diskACL(v string) (string, bool) {
	if len(v) < 4 || (len(v)-4)%8 != 0 || v[:4] != "\x02\x00\x00\x00" {
		return "", false
	}
	out := []byte{1, 0, 0, 0}
	for p := v[4:]; p != ""; p = p[8:] {
		out = append(out, p[:4]...)
		if tag := binary.LittleEndian.Uint16([]byte(p)); tag == 2 || tag == 8 {
			out = append(out, p[4:8]...)
		}
	}
	return string(out), true
}
