package unpack

import (
	"bufio"
	"encoding/binary"
	"errors"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// counted counts what is read.
type counted struct {
	r *bufio.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func (c *counted) ReadByte() (byte, error) {
	b, err := c.r.ReadByte()
	if err == nil {
		c.n++
	}
	return b, err
}

// xzStream unpacks any number of xz streams behind each other as they arrive.
type xzStream struct {
	in    *counted
	check byte
	block *lzma.Reader2 // nil between blocks
	sum   hash.Hash
	err   error
	begun bool
	open  bool // between a stream's header and its index
}

func (x *xzStream) Read(p []byte) (int, error) {
	for x.err == nil {
		if x.block == nil {
			x.err = x.next()
			continue
		}
		n, err := x.block.Read(p)
		if x.sum != nil {
			x.sum.Write(p[:n])
		}
		if err == io.EOF {
			err = x.endBlock()
		}
		x.err = unexpected(err)
		if n > 0 {
			return n, nil
		}
	}
	return 0, x.err
}

// unexpected is an end of the input where none may be.
func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (x *xzStream) take(n int) ([]byte, error) {
	b := make([]byte, n)
	_, err := io.ReadFull(x.in, b) // cut off: ErrUnexpectedEOF or EOF, neither of which is an end here
	return b, unexpected(err)
}

// next begins a block, after the stream's header or what ends the last one.
func (x *xzStream) next() error {
	if !x.open {
		if x.begun {
			for { // streams are padded with zeros
				b, err := x.in.r.Peek(4)
				if len(b) == 0 && err == io.EOF {
					return io.EOF
				}
				if err != nil {
					return unexpected(err)
				}
				if binary.LittleEndian.Uint32(b) != 0 {
					break
				}
				_, _ = x.in.r.Discard(4)
			}
		}
		b, err := x.take(12)
		if err != nil {
			return err
		}
		if string(b[:6]) != xzMagic || b[6] != 0 || b[7] > 0x0f || crc32.ChecksumIEEE(b[6:8]) != binary.LittleEndian.Uint32(b[8:]) {
			return errors.New("xz stream header is damaged")
		}
		x.check, x.open, x.begun = b[7], true, true
	}
	x.in.n = 0
	first, err := x.take(1)
	if err != nil {
		return err
	}
	if first[0] == 0 {
		x.open = false
		return x.index()
	}
	rest, err := x.take((int(first[0])+1)*4 - 1)
	if err != nil {
		return err
	}
	head := append(first, rest[:len(rest)-4]...)
	if crc32.ChecksumIEEE(head) != binary.LittleEndian.Uint32(rest[len(rest)-4:]) {
		return errors.New("xz block header is damaged")
	}
	x86, dictionary, err := parseXZBlockHeader(head)
	if err != nil {
		return err
	}
	if x86 {
		return errors.New("xz with the x86 filter is for kernels only; pack it again without")
	}
	switch x.check {
	case 1:
		x.sum = crc32.NewIEEE()
	case 4:
		x.sum = crc64.New(crc64.MakeTable(crc64.ECMA))
	default:
		x.sum = nil
	}
	x.block, err = lzma.Reader2Config{DictCap: dictionary}.NewReader2(x.in)
	return unexpected(err)
}

// endBlock reads padding and check of a block.
func (x *xzStream) endBlock() error {
	if !x.block.EOS() {
		return io.ErrUnexpectedEOF
	}
	x.block = nil
	if _, err := x.take(int(-x.in.n & 3)); err != nil {
		return err
	}
	sum, err := x.take(xzCheckSizes[x.check])
	if err != nil || x.sum == nil {
		return err
	}
	ok := false
	switch h := x.sum.(type) {
	case hash.Hash32:
		ok = h.Sum32() == binary.LittleEndian.Uint32(sum)
	case hash.Hash64:
		ok = h.Sum64() == binary.LittleEndian.Uint64(sum)
	}
	if !ok {
		return errors.New("xz check sum does not match")
	}
	return nil
}

// index passes over the index, whose first byte was read, and the footer.
func (x *xzStream) index() error {
	records, err := binary.ReadUvarint(x.in)
	if err != nil {
		return unexpected(err)
	}
	for range records { // each costs bytes of the input, which end
		for range 2 {
			if _, err := binary.ReadUvarint(x.in); err != nil {
				return unexpected(err)
			}
		}
	}
	if _, err := x.take(int(-x.in.n&3) + 4); err != nil {
		return err
	}
	footer, err := x.take(12)
	if err == nil && string(footer[10:]) != "YZ" {
		err = errors.New("xz stream footer is damaged")
	}
	return err
}
