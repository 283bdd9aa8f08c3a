package unpack

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// The xz container (The .xz File Format 1.2.0), read here because the library
// knows only the LZMA2 filter and kernels are packed with the x86 branch
// filter in front of it (scripts/xz_wrap.sh).

const xzMagic = "\xfd7zXZ\x00"

const (
	xzFilterX86   = 0x04
	xzFilterLZMA2 = 0x21
)

// xzCheckSizes are the lengths of the check field by check type.
var xzCheckSizes = [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}

// unpackXZ unpacks the first stream of src; whatever follows it is ignored.
func unpackXZ(src []byte, limit int64) ([]byte, error) {
	const headerLen = 12
	if len(src) < headerLen {
		return nil, io.ErrUnexpectedEOF
	}
	if src[6] != 0 || src[7] > 0x0f || crc32.ChecksumIEEE(src[6:8]) != binary.LittleEndian.Uint32(src[8:]) {
		return nil, errors.New("xz stream header is damaged")
	}
	check := src[7]
	rest := src[headerLen:]
	var out []byte
	for {
		if len(rest) == 0 {
			return nil, io.ErrUnexpectedEOF
		}
		if rest[0] == 0 { // the index: no more blocks
			return out, nil
		}
		block, used, err := unpackXZBlock(rest, check, limit-int64(len(out)))
		if err != nil {
			return nil, err
		}
		if out == nil {
			out = block
		} else {
			out = append(out, block...)
		}
		rest = rest[used:]
	}
}

// unpackXZBlock unpacks the block at the start of src and returns how many
// bytes of src it took.
func unpackXZBlock(src []byte, check byte, limit int64) (out []byte, used int, err error) {
	size := (int(src[0]) + 1) * 4
	if size > len(src) {
		return nil, 0, io.ErrUnexpectedEOF
	}
	head := src[:size-4]
	if crc32.ChecksumIEEE(head) != binary.LittleEndian.Uint32(src[size-4:]) {
		return nil, 0, errors.New("xz block header is damaged")
	}
	x86, dictionary, err := parseXZBlockHeader(head)
	if err != nil {
		return nil, 0, err
	}
	in := bytes.NewReader(src[size:])
	r, err := lzma.Reader2Config{DictCap: dictionary}.NewReader2(in)
	if err != nil {
		return nil, 0, err
	}
	if out, err = ReadLimited(r, limit); err != nil {
		return nil, 0, err
	}
	if !r.EOS() {
		return nil, 0, io.ErrUnexpectedEOF
	}
	used = len(src) - in.Len()
	for (used-size)%4 != 0 {
		used++
	}
	sum := xzCheckSizes[check]
	if used+sum > len(src) {
		return nil, 0, io.ErrUnexpectedEOF
	}
	if x86 {
		decodeX86Branches(out)
	}
	if !xzCheckOK(check, src[used:used+sum], out) {
		return nil, 0, errors.New("xz check sum does not match")
	}
	return out, used + sum, nil
}

// parseXZBlockHeader reads the filter flags of a block header.
func parseXZBlockHeader(head []byte) (x86 bool, dictionary int, err error) {
	flags := head[1]
	p := head[2:]
	next := func() uint64 {
		v, n := binary.Uvarint(p)
		if n <= 0 {
			err = errors.New("xz block header is damaged")
			p = nil
			return 0
		}
		p = p[n:]
		return v
	}
	if flags&0x40 != 0 {
		next() // packed size
	}
	if flags&0x80 != 0 {
		next() // unpacked size
	}
	for range int(flags&3) + 1 {
		id, n := next(), next()
		if err != nil {
			return false, 0, err
		}
		if n > uint64(len(p)) {
			return false, 0, errors.New("xz block header is damaged")
		}
		props := p[:n]
		p = p[n:]
		switch {
		case id == xzFilterX86 && n == 0 && dictionary == 0:
			x86 = true
		case id == xzFilterLZMA2 && n == 1 && dictionary == 0 && props[0] <= 40:
			d, err := lzma.DecodeDictCap(props[0])
			if err != nil || d > maxDictionary {
				return false, 0, fmt.Errorf("xz dictionary of %d bytes is larger than the accepted %d", d, maxDictionary)
			}
			dictionary = int(max(d, lzma.MinDictCap))
		default:
			return false, 0, fmt.Errorf("xz filter %#x is not supported", id)
		}
	}
	if dictionary == 0 {
		return false, 0, errors.New("xz block without LZMA2 filter")
	}
	return x86, dictionary, nil
}

// xzCheckOK compares a block's check. Kinds that xz does not define, and
// SHA-256, which kernels do not use, are not looked at.
func xzCheckOK(check byte, sum, data []byte) bool {
	switch check {
	case 1:
		return crc32.ChecksumIEEE(data) == binary.LittleEndian.Uint32(sum)
	case 4:
		return crc64.Checksum(data, crc64.MakeTable(crc64.ECMA)) == binary.LittleEndian.Uint64(sum)
	}
	return true
}

// decodeX86Branches undoes the x86 branch filter in place. The filter turned
// the relative target of each CALL (E8) and JMP (E9) into an absolute one, so
// that calls of one function look alike. An operand is taken for an address
// only when its top byte is 00 or FF, and bytes shortly before it that look
// like opcodes themselves make it less likely; recent is the history of those,
// one bit for each of the last three bytes.
func decodeX86Branches(b []byte) {
	signByte := func(v byte) bool { return v == 0x00 || v == 0xff }
	// For each history: is an operand still believed, and which of its bytes
	// must then be no sign byte (counted from the top).
	believed := [8]bool{true, true, true, false, true, false, false, false}
	topByte := [8]uint{0, 1, 2, 2, 3, 3, 3, 3}

	var recent uint
	last := -1 // position of the last opcode byte
	for i := 0; i+5 <= len(b); {
		if b[i]&0xfe != 0xe8 {
			i++
			continue
		}
		if d := i - last; last < 0 || d > 3 {
			recent = 0
		} else {
			recent = recent << (d - 1) & 7
		}
		last = i
		if recent != 0 && (!believed[recent] || signByte(b[i+4-int(topByte[recent])])) {
			recent = recent<<1&7 | 1
			i++
			continue
		}
		if !signByte(b[i+4]) {
			recent = recent<<1&7 | 1
			i++
			continue
		}
		v := binary.LittleEndian.Uint32(b[i+1:])
		here := uint32(i + 5)
		for {
			v -= here
			if recent == 0 {
				break
			}
			shift := 24 - 8*topByte[recent]
			if !signByte(byte(v >> shift)) {
				break
			}
			v ^= 1<<(shift+8) - 1
		}
		if v&(1<<24) != 0 { // sign extend from 25 bits
			v |= 0xff000000
		} else {
			v &= 0x00ffffff
		}
		binary.LittleEndian.PutUint32(b[i+1:], v)
		// The four operand bytes count as history too: none was an opcode.
		i += 5
		last, recent = i-1, 0
	}
}
