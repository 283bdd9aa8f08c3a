// Package blkid recognises file systems and partitions by what is on a disk,
// as blkid(8) does. Disks are not trusted.
package blkid

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
)

// FS is what a file system says about itself in its superblock.
type FS struct {
	Type  string // as /proc/filesystems names it; empty = not recognised
	UUID  string
	Label string
}

// Probe recognises the file system on a disk or partition. What cannot be
// read counts as not recognised.
func Probe(r io.ReaderAt) FS {
	read := func(off int64, n int) []byte {
		b := make([]byte, n)
		if m, _ := r.ReadAt(b, off); m != n {
			return nil
		}
		return b
	}
	// ext2, 3, 4: fs/ext4/ext4.h, struct ext4_super_block at 1024.
	if b := read(1024, 0x88); b != nil && binary.LittleEndian.Uint16(b[0x38:]) == 0xef53 {
		const (
			compatJournal                  = 0x4
			incompatSince4, roCompatSince4 = ^uint32(0x1f), ^uint32(0x7)
		)
		le := binary.LittleEndian
		t := "ext2"
		switch {
		case le.Uint32(b[0x60:])&incompatSince4 != 0, le.Uint32(b[0x64:])&roCompatSince4 != 0:
			t = "ext4"
		case le.Uint32(b[0x5c:])&compatJournal != 0:
			t = "ext3"
		}
		return FS{t, formatUUID(b[0x68:0x78]), labelString(b[0x78:0x88])}
	}
	// XFS: fs/xfs/libxfs/xfs_format.h, struct xfs_dsb at 0.
	if b := read(0, 0x78); b != nil && string(b[:4]) == "XFSB" {
		return FS{"xfs", formatUUID(b[0x20:0x30]), labelString(b[0x6c:0x78])}
	}
	// Btrfs: struct btrfs_super_block at 64 KiB.
	if b := read(0x10000, 0x22b); b != nil && string(b[0x40:0x48]) == "_BHRfS_M" {
		label := b[0x12b:]
		if more := read(0x1012b, 256); more != nil {
			label = more
		}
		return FS{"btrfs", formatUUID(b[0x20:0x30]), labelString(label)}
	}
	if b := read(0, 4); string(b) == "hsqs" {
		return FS{Type: "squashfs"}
	}
	// EROFS: fs/erofs/erofs_fs.h, struct erofs_super_block at 1024.
	if b := read(1024, 0x50); b != nil && binary.LittleEndian.Uint32(b) == 0xe0f5e1e2 {
		return FS{"erofs", formatUUID(b[0x30:0x40]), labelString(b[0x40:0x50])}
	}
	// F2FS: struct f2fs_super_block at 1024.
	if b := read(1024, 0x7c); b != nil && binary.LittleEndian.Uint32(b) == 0xf2f52010 {
		return FS{Type: "f2fs", UUID: formatUUID(b[0x6c:0x7c])}
	}
	return FS{}
}

// formatUUID writes 16 bytes as blkid does.
func formatUUID(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

func labelString(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// PartUUIDs reads the identities of a disk's partitions, by partition number:
// the unique GUID of a GPT entry, or disk signature and number of an MBR.
func PartUUIDs(r io.ReaderAt) map[int]string {
	ids := map[int]string{}
	mbr := make([]byte, 512)
	if n, _ := r.ReadAt(mbr, 0); n != len(mbr) || mbr[510] != 0x55 || mbr[511] != 0xaa {
		return ids
	}
	for _, sector := range []int64{512, 4096} {
		head := make([]byte, 92)
		if n, _ := r.ReadAt(head, sector); n != len(head) || string(head[:8]) != "EFI PART" {
			continue
		}
		le := binary.LittleEndian
		table, count, size := le.Uint64(head[72:]), le.Uint32(head[80:]), le.Uint32(head[84:])
		if size < 128 || size > 4096 || count > 1024 || table == 0 || table > 1<<40 {
			return ids
		}
		entry := make([]byte, 128)
		for i := range int64(count) {
			if n, _ := r.ReadAt(entry, int64(table)*sector+i*int64(size)); n != len(entry) {
				break
			}
			if !bytes.Equal(entry[:16], make([]byte, 16)) {
				ids[int(i)+1] = formatGUID(entry[16:32])
			}
		}
		return ids
	}
	signature := binary.LittleEndian.Uint32(mbr[440:])
	for i := range 4 {
		if mbr[446+16*i+4] != 0 && signature != 0 {
			ids[i+1] = fmt.Sprintf("%08x-%02x", signature, i+1)
		}
	}
	return ids
}

// formatGUID writes an EFI GUID, whose first three fields are little endian.
func formatGUID(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}
