package ext4

import (
	"cmp"
	"encoding/binary"
	"slices"
	"strings"
)

// dirent is an entry of a folder.
type dirent struct {
	name string
	num  uint32
	kind byte
	hash uint32
}

func (d *dirent) size() int { return 8 + (len(d.name)+3)&^3 }

// kindOf is a file type as entries of folders have it.
func kindOf(mode uint32) byte {
	return map[uint32]byte{ModeFile: 1, ModeDir: 2, ModeChar: 3, ModeBlock: 4, ModeFIFO: 5, ModeSocket: 6, ModeSymlink: 7}[mode&ModeType]
}

func putDirent(b []byte, d dirent, recLen int) {
	binary.LittleEndian.PutUint32(b[0:], d.num)
	binary.LittleEndian.PutUint16(b[4:], uint16(recLen))
	b[6], b[7] = byte(len(d.name)), d.kind
	copy(b[8:], d.name)
}

// fillBlock writes as many entries as one block takes, and says how many.
func fillBlock(b []byte, es []dirent) int {
	at, last, n := 0, 0, 0
	for ; n < len(es) && at+es[n].size() <= len(b); n++ {
		last = at
		putDirent(b[at:], es[n], es[n].size())
		at += es[n].size()
	}
	binary.LittleEndian.PutUint16(b[last+4:], uint16(len(b)-last)) // the last entry reaches to the end
	return n
}

// dirBlocks are the blocks of folder n, whose parent is given, and whether
// they begin with an index.
func (w *Writer) dirBlocks(n *Inode, parent uint32) (blocks [][]byte, index bool) {
	es := make([]dirent, 0, len(n.children)+2)
	es = append(es, dirent{name: ".", num: n.num, kind: 2}, dirent{name: "..", num: parent, kind: 2})
	size := es[0].size() + es[1].size()
	for _, name := range n.Names() {
		c := n.children[name]
		es = append(es, dirent{name: name, num: c.num, kind: kindOf(c.Mode)})
		size += es[len(es)-1].size()
	}
	if size <= blockSize {
		b := make([]byte, blockSize)
		fillBlock(b, es)
		return [][]byte{b}, false
	}
	if blocks, ok := w.indexed(es); ok {
		return blocks, true
	}
	for len(es) > 0 {
		b := make([]byte, blockSize)
		es = es[fillBlock(b, es):]
		blocks = append(blocks, b)
	}
	return blocks, false
}

const (
	rootEntries = (blockSize - 32) / 8
	nodeEntries = (blockSize - 8) / 8
)

// indexed are the blocks of a folder with an index of hashes: its root, nodes
// below it if there are many, and the entries in the order of their hashes.
func (w *Writer) indexed(es []dirent) ([][]byte, bool) {
	dots, es := es[:2], es[2:]
	for i := range es {
		es[i].hash = hashName(es[i].name, w.seed)
	}
	slices.SortFunc(es, func(a, b dirent) int { return cmp.Or(cmp.Compare(a.hash, b.hash), strings.Compare(a.name, b.name)) })
	var leaves [][]byte
	var keys []uint32
	for at := 0; at < len(es); {
		b := make([]byte, blockSize)
		key := es[at].hash
		if at > 0 && key == es[at-1].hash {
			key |= 1 // goes on with the hash of the leaf before
		}
		at += fillBlock(b, es[at:])
		keys, leaves = append(keys, key), append(leaves, b)
	}
	root := make([]byte, blockSize)
	putDirent(root, dots[0], 12)
	putDirent(root[12:], dots[1], blockSize-12)
	root[28], root[29] = 1, 8 // half MD4; the length of these eight bytes
	if len(leaves) <= rootEntries {
		putIndex(root[32:], rootEntries, keys, 1)
		return append([][]byte{root}, leaves...), true
	}
	root[30] = 1
	var nodes [][]byte
	var tops []uint32
	count := (len(leaves) + nodeEntries - 1) / nodeEntries
	if count > rootEntries {
		return nil, false
	}
	for at := 0; at < len(leaves); at += nodeEntries {
		b := make([]byte, blockSize)
		binary.LittleEndian.PutUint16(b[4:], blockSize) // an entry of no file, for those who know no index
		part := keys[at:min(at+nodeEntries, len(keys))]
		putIndex(b[8:], nodeEntries, part, uint32(1+count+at))
		nodes, tops = append(nodes, b), append(tops, part[0])
	}
	putIndex(root[32:], rootEntries, tops, 1)
	return append(append([][]byte{root}, nodes...), leaves...), true
}

// putIndex writes limit and count and the entries of an index, whose blocks
// follow each other from first on. The first one has no key.
func putIndex(b []byte, limit int, keys []uint32, first uint32) {
	le := binary.LittleEndian
	for i, k := range keys {
		le.PutUint32(b[8*i:], k)
		le.PutUint32(b[8*i+4:], first+uint32(i))
	}
	le.PutUint16(b[0:], uint16(limit))
	le.PutUint16(b[2:], uint16(len(keys)))
}

// hashName is the half MD4 of a name, whose bytes are unsigned
// (fs/ext4/hash.c).
func hashName(name string, seed [16]byte) uint32 {
	var s [4]uint32
	for i := range s {
		s[i] = binary.LittleEndian.Uint32(seed[4*i:])
	}
	for rest := name; rest != ""; rest = rest[min(32, len(rest)):] {
		var in [8]uint32
		n := len(rest)
		pad := uint32(n)<<8 | uint32(n)
		pad |= pad << 16
		for i := range in {
			v := pad
			for j := 4 * i; j < min(4*i+4, n); j++ {
				v = v<<8 + uint32(rest[j])
			}
			in[i] = v
		}
		halfMD4(&s, in)
	}
	h := s[1] &^ 1
	if h == 0xfffffffe { // means the end of a folder
		h = 0xfffffffc
	}
	return h
}

func halfMD4(s *[4]uint32, in [8]uint32) {
	a, b, c, d := s[0], s[1], s[2], s[3]
	rol := func(x uint32, n int) uint32 { return x<<n | x>>(32-n) }
	f := func(x, y, z uint32) uint32 { return z ^ x&(y^z) }
	g := func(x, y, z uint32) uint32 { return x&y + (x^y)&z }
	h := func(x, y, z uint32) uint32 { return x ^ y ^ z }
	round := func(f func(x, y, z uint32) uint32, k uint32, order [8]int, shift [4]int) {
		for i := 0; i < 8; i += 4 {
			a = rol(a+f(b, c, d)+in[order[i]]+k, shift[0])
			d = rol(d+f(a, b, c)+in[order[i+1]]+k, shift[1])
			c = rol(c+f(d, a, b)+in[order[i+2]]+k, shift[2])
			b = rol(b+f(c, d, a)+in[order[i+3]]+k, shift[3])
		}
	}
	round(f, 0, [8]int{0, 1, 2, 3, 4, 5, 6, 7}, [4]int{3, 7, 11, 19})
	round(g, 0x5a827999, [8]int{1, 3, 5, 7, 0, 2, 4, 6}, [4]int{3, 5, 9, 13})
	round(h, 0x6ed9eba1, [8]int{3, 7, 2, 6, 1, 5, 0, 4}, [4]int{3, 9, 11, 15})
	s[0] += a
	s[1] += b
	s[2] += c
	s[3] += d
}
