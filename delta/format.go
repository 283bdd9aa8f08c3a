package delta

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"
)

// A stream is
//
//	magic[16]  length[4]  Header as JSON
//	pieces:    kind[1] offset[8] length[8] stored[4] SHA-256[32]  stored bytes
//
// with numbers in little endian. The last piece has the kind end, the number of
// pieces before it in offset, and the SHA-256 of the heads of all of them.
const magic = "moovm delta v1\n\x00"

const (
	maxPiece  = 1 << 20 // bytes of the disk in a piece of data
	maxStored = maxPiece + 64<<10
	maxHeader = 64 << 10
	headSize  = 1 + 8 + 8 + 4 + sha256.Size
	sector    = 512
)

// kind is what a piece is.
type kind byte

const (
	data kind = 1 // stored is zstd
	zero kind = 2 // reads as zeros; nothing is stored
	end  kind = 3
)

// Header is what a stream says of itself.
type Header struct {
	// Size is the disk's, in bytes.
	Size int64 `json:"virtual-size"`
	// Base is the Digest of what the stream stands on; empty if on nothing.
	Base string `json:"base,omitempty"`
	// Source identifies the image and its state: streams of the same source
	// have the same pieces.
	Source string `json:"source"`
	// From is how many pieces were left out at the beginning.
	From int64 `json:"from,omitempty"`
}

var (
	// ErrStream says that what is read is no such stream, or was damaged.
	ErrStream = errors.New("the stream is damaged")
	// ErrCut says that a stream ended before its end.
	ErrCut = errors.New("the stream was cut off")
)

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrStream, fmt.Sprintf(format, args...))
}

// piece is one, without what is stored.
type piece struct {
	kind           kind
	offset, length int64
	stored         uint32
	sum            [sha256.Size]byte
}

func (p *piece) append(b []byte) []byte {
	b = append(b, byte(p.kind))
	b = binary.LittleEndian.AppendUint64(b, uint64(p.offset))
	b = binary.LittleEndian.AppendUint64(b, uint64(p.length))
	b = binary.LittleEndian.AppendUint32(b, p.stored)
	return append(b, p.sum[:]...)
}

func parsePiece(b []byte) (p piece) {
	p.kind = kind(b[0])
	p.offset = int64(binary.LittleEndian.Uint64(b[1:]))
	p.length = int64(binary.LittleEndian.Uint64(b[9:]))
	p.stored = binary.LittleEndian.Uint32(b[17:])
	copy(p.sum[:], b[21:])
	return p
}

// check looks at a piece of a disk of size bytes, of which the pieces before
// reach up to at.
func (p *piece) check(at, size int64) error {
	switch {
	case p.kind != data && p.kind != zero:
		return damaged("a piece of kind %d", p.kind)
	case p.offset < at || p.length <= 0 || p.offset > size || p.length > size-p.offset || (p.offset|p.length)%sector != 0:
		return damaged("a piece of %d bytes at %d of a disk of %d, of which %d were there", p.length, p.offset, size, at)
	case p.kind == data && (p.length > maxPiece || p.stored == 0 || p.stored > maxStored):
		return damaged("a piece of %d bytes, %d stored", p.length, p.stored)
	case p.kind == zero && p.stored != 0:
		return damaged("zeros with %d bytes stored", p.stored)
	}
	return nil
}

// writer writes a stream.
type writer struct {
	w     io.Writer
	skip  int64 // pieces that are counted and not written
	count int64
	heads hash.Hash
	enc   *zstd.Encoder
	buf   []byte
}

func newWriter(w io.Writer, h Header) (*writer, error) {
	text, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(maxPiece))
	if err != nil {
		return nil, err
	}
	b := binary.LittleEndian.AppendUint32([]byte(magic), uint32(len(text)))
	if _, err := w.Write(append(b, text...)); err != nil {
		return nil, err
	}
	return &writer{w: w, skip: h.From, heads: sha256.New(), enc: enc}, nil
}

func (w *writer) piece(p piece, contents []byte) error {
	skipped := w.count < w.skip
	w.count++
	if skipped {
		return nil
	}
	var stored []byte
	if p.kind == data {
		p.sum = sha256.Sum256(contents)
		w.buf = w.enc.EncodeAll(contents, w.buf[:0])
		stored = w.buf
	}
	p.stored = uint32(len(stored))
	head := p.append(nil)
	w.heads.Write(head)
	if _, err := w.w.Write(head); err != nil {
		return err
	}
	_, err := w.w.Write(stored)
	return err
}

func (w *writer) end() error {
	if w.count < w.skip {
		return fmt.Errorf("there are %d pieces, fewer than the %d that are to be left out", w.count, w.skip)
	}
	p := piece{kind: end, offset: w.count}
	copy(p.sum[:], w.heads.Sum(nil))
	_, err := w.w.Write(p.append(nil))
	return err
}

// reader reads a stream.
type reader struct {
	Header

	r     *bufio.Reader
	count int64 // pieces before the next one, with those that were left out
	at    int64 // up to where they reach
	heads hash.Hash
	dec   *zstd.Decoder
	buf   []byte
	plain []byte
}

func newReader(from io.Reader) (*reader, error) {
	r := &reader{r: bufio.NewReaderSize(from, 1<<20), heads: sha256.New()}
	var head [len(magic) + 4]byte
	if err := r.full(head[:]); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(head[len(magic):])
	switch {
	case string(head[:len(magic)]) != magic:
		return nil, damaged("it does not begin like one of `moovm export`")
	case n > maxHeader:
		return nil, damaged("its header has %d bytes", n)
	}
	text := make([]byte, n)
	if err := r.full(text); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &r.Header); err != nil {
		return nil, damaged("its header is none: %v", err)
	}
	if r.Size < 0 || r.Size%sector != 0 || r.From < 0 {
		return nil, damaged("a disk of %d bytes, from piece %d", r.Size, r.From)
	}
	r.count = r.From
	var err error
	r.dec, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxPiece), zstd.WithDecoderMaxWindow(maxPiece))
	return r, err
}

// full reads all of p.
func (r *reader) full(p []byte) error {
	_, err := io.ReadFull(r.r, p)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return ErrCut
	}
	return err
}

// next reads the next piece, and its contents if it is data, which are valid
// until the next call. At the end of the stream it returns io.EOF.
func (r *reader) next() (piece, []byte, error) {
	var head [headSize]byte
	if err := r.full(head[:]); err != nil {
		return piece{}, nil, err
	}
	p := parsePiece(head[:])
	if p.kind == end {
		if p.offset != r.count || string(p.sum[:]) != string(r.heads.Sum(nil)) {
			return p, nil, damaged("pieces are missing")
		}
		return p, nil, io.EOF
	}
	if err := p.check(r.at, r.Size); err != nil {
		return p, nil, err
	}
	r.heads.Write(head[:])
	r.buf = append(r.buf[:0], make([]byte, p.stored)...)
	if err := r.full(r.buf); err != nil {
		return p, nil, err
	}
	if p.kind == data {
		var err error
		if r.plain, err = r.dec.DecodeAll(r.buf, r.plain[:0]); err != nil {
			return p, nil, damaged("piece %d: %v", r.count, err)
		}
		if int64(len(r.plain)) != p.length || sha256.Sum256(r.plain) != p.sum {
			return p, nil, damaged("piece %d is not what was sent", r.count)
		}
	}
	r.count++
	r.at = p.offset + p.length
	return p, r.plain, nil
}

func (r *reader) close() { r.dec.Close() }
