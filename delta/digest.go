package delta

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"

	"github.com/moovm/moovm/cowdisk"
)

// Digest identifies the contents of a disk, whatever holds them: the SHA-256 of
// the disk's size and of the place and SHA-256 of each MiB that is not all
// zeros, in hexadecimal. report, if not nil, is told how many bytes of how many
// were looked at.
func Digest(ctx context.Context, d *cowdisk.Disk, report func(done, total int64)) (string, error) {
	all := sha256.New()
	var n [8]byte
	number := func(v int64) {
		binary.LittleEndian.PutUint64(n[:], uint64(v))
		all.Write(n[:])
	}
	number(d.Size())
	next := int64(0) // the first MiB that was not looked at
	buf := make([]byte, maxPiece)
	err := d.Extents(ctx, 0, d.Size(), func(e cowdisk.Extent) error {
		if e.Zero {
			return nil
		}
		for at := max(next, e.Start/maxPiece*maxPiece); at < e.Start+e.Length; at += maxPiece {
			p := buf[:min(maxPiece, d.Size()-at)]
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			if _, err := d.ReadAt(p, at); err != nil {
				return err
			}
			if !isZero(p) {
				sum := sha256.Sum256(p)
				number(at)
				all.Write(sum[:])
			}
			next = at + maxPiece
			if report != nil {
				report(min(next, d.Size()), d.Size())
			}
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return hex.EncodeToString(all.Sum(nil)), nil
}

var zeros [4096]byte

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if !bytes.Equal(p[:n], zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}
