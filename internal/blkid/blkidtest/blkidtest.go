// Package blkidtest makes disks with partitions, for tests.
package blkidtest

import (
	"encoding/binary"
)

// GPT is the start of a disk with a GUID partition table.
func GPT() []byte {
	b := make([]byte, 34*512)
	b[510], b[511] = 0x55, 0xaa
	copy(b[512:], "EFI PART")
	le := binary.LittleEndian
	le.PutUint64(b[512+72:], 2)
	le.PutUint32(b[512+80:], 4)
	le.PutUint32(b[512+84:], 128)
	for i := range 2 {
		e := b[1024+128*i:]
		e[0] = 1
		copy(e[16:], "\x78\x56\x34\x12\xbc\x9a\xf0\xde\x01\x02\x03\x04\x05\x06\x07")
		e[31] = byte(i)
	}
	return b
}

// MBR is the start of a disk with a DOS partition table.
func MBR() []byte {
	b := make([]byte, 1024)
	b[510], b[511] = 0x55, 0xaa
	binary.LittleEndian.PutUint32(b[440:], 0xdeadbeef)
	b[446+4] = 0x83
	return b
}
