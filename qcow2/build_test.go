package qcow2

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// cell is what a test image has for one cluster.
type cell struct {
	kind        Kind
	packed      bool
	alloc, zero uint32 // extended L2, for clusters that are not packed
}

// plan is a test image: small, and written by nobody else's code. Its disk's data are the bytes of pattern.
type plan struct {
	version int
	bits    uint
	zstd    bool
	ext     bool
	size    int64
	cells   []cell
	backing string
}

// pattern is the byte of data at off: compressible, but different everywhere.
func pattern(off int64) byte { return byte(off>>9) ^ byte(off%7) }

// below is the byte of a test's backing file at off.
func below(off int64) byte { return byte(off%251) | 1 }

func fill(off, n int64, f func(int64) byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = f(off + int64(i))
	}
	return b
}

// build writes the image, and what its disk contains over a backing file of below.
func (p plan) build() (file, disk []byte) {
	be := binary.BigEndian
	cs := int64(1) << p.bits
	words := int64(1)
	if p.ext {
		words = 2
	}
	perTable := cs / 8 / words
	tables := (int64(len(p.cells)) + perTable - 1) / perTable
	l1Clusters := max((tables*8+cs-1)/cs, 1)
	l2 := (1 + l1Clusters) * cs
	file = make([]byte, l2+tables*cs)
	copy(file, Magic)
	be.PutUint32(file[4:], uint32(p.version))
	be.PutUint32(file[20:], uint32(p.bits))
	be.PutUint64(file[24:], uint64(p.size))
	be.PutUint32(file[36:], uint32(tables))
	be.PutUint64(file[40:], uint64(cs))
	names := headerV2
	if p.version == 3 {
		names = headerV3 + 8
		be.PutUint32(file[100:], uint32(names))
		incompat := uint64(0)
		if p.zstd {
			incompat |= featCompression
			file[headerV3] = 1
		}
		if p.ext {
			incompat |= featExtendedL2
		}
		be.PutUint64(file[72:], incompat)
	}
	if p.backing != "" {
		be.PutUint64(file[8:], uint64(names)+8)
		be.PutUint32(file[16:], uint32(len(p.backing)))
		copy(file[names+8:], p.backing)
	}
	for i := range tables {
		be.PutUint64(file[cs+i*8:], uint64(l2+i*cs)|flagCopied)
	}
	disk = fill(0, int64(len(p.cells))*cs, below)
	for i, c := range p.cells {
		off := int64(i) * cs
		at := l2 + int64(i)*words*8
		data := fill(off, cs, pattern)
		switch {
		case c.packed:
			file, at = p.pack(file, at, data)
			copy(disk[off:], data)
			continue
		case p.ext:
			be.PutUint64(file[at+8:], uint64(c.zero)<<32|uint64(c.alloc))
			for s := range int64(subclusters) {
				n := cs / subclusters
				if c.alloc>>s&1 != 0 {
					copy(disk[off+s*n:off+(s+1)*n], data[s*n:])
				} else if c.zero>>s&1 != 0 {
					clear(disk[off+s*n : off+(s+1)*n])
				}
			}
			if c.alloc == 0 {
				continue
			}
		case c.kind == Zero:
			be.PutUint64(file[at:], flagZero)
			clear(disk[off : off+cs])
			continue
		case c.kind == Absent:
			continue
		default:
			copy(disk[off:], data)
		}
		pos := (int64(len(file)) + cs - 1) / cs * cs
		file = append(file, make([]byte, pos-int64(len(file)))...)
		file = append(file, data...)
		be.PutUint64(file[at:], uint64(pos)|flagCopied)
	}
	return file, disk[:p.size]
}

// pack appends data compressed and writes the entry at.
func (p plan) pack(file []byte, at int64, data []byte) ([]byte, int64) {
	var b bytes.Buffer
	if p.zstd {
		w, _ := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1))
		w.Write(data)
		w.Close()
	} else {
		w, _ := flate.NewWriter(&b, 1)
		w.Write(data)
		w.Close()
	}
	pos := int64(len(file))
	sectors := (pos&511+int64(b.Len())+511)/512 - 1
	file = append(file, b.Bytes()...)
	binary.BigEndian.PutUint64(file[at:], flagCompressed|uint64(sectors)<<(62-(p.bits-8))|uint64(pos))
	return file, at
}

// mixed is an image with some of everything that its version has.
func mixed(version int, bits uint, zstd, ext bool, n int) plan {
	rng := rand.New(rand.NewPCG(uint64(bits), uint64(n)))
	p := plan{version: version, bits: bits, zstd: zstd, ext: ext, size: int64(n)<<bits - 300, backing: "base.img"}
	for range n {
		c := cell{kind: Kind(rng.IntN(3)), packed: rng.IntN(4) == 0, alloc: rng.Uint32(), zero: rng.Uint32()}
		if version == 2 && c.kind == Zero {
			c.kind = Data
		}
		c.zero &^= c.alloc
		p.cells = append(p.cells, c)
	}
	return p
}

// backingFile is an endless file of below.
type backingFile struct{}

func (backingFile) ReadAt(p []byte, off int64) (int, error) {
	for i := range p {
		p[i] = below(off + int64(i))
	}
	return len(p), nil
}
