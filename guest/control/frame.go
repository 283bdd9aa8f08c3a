package control

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A FrameKind is what a frame is about. The control line carries frames in both directions:
//
//	byte 0, 1   0xA6 0x6D
//	byte 2      FrameKind
//	byte 3, 4   payload length, little endian, at most MaxFrame
//	byte 5      check: the sum of bytes 0 to 4, inverted
//	byte 6…     payload
//
// A serial line may have bytes on it that no init wrote (a driver that probes
// the chip, a program of the guest that opened the port), so a reader that
// does not find a frame where one should be looks for the next one.
type FrameKind byte

// The kinds of frames.
const (
	// From the guest.
	FrameHello  FrameKind = 1 // JSON Hello; the first
	FrameStdout FrameKind = 2 // bytes
	FrameStderr FrameKind = 3 // bytes
	FrameExit   FrameKind = 4 // uint32 status, uint32 signal (0: none)
	FrameError  FrameKind = 5 // JSON GuestError: nothing will come of it
	FrameWarn   FrameKind = 6 // text: something is missing, but not needed
	FrameStart  FrameKind = 7 // the command or the disk's init starts now; text: which
	FrameCredit FrameKind = 8 // uint32: that many more bytes of stdin are welcome
	FrameBye    FrameKind = 9 // the guest is about to switch off

	// From the host.
	FrameStdin    FrameKind = 33 // bytes, within the credit
	FrameStdinEOF FrameKind = 34
	FrameResize   FrameKind = 35 // uint16 rows, uint16 columns
	FrameSignal   FrameKind = 36 // uint8
)

// The sizes of the control line, in bytes.
const (
	frameMagic0    = 0xa6
	frameMagic1    = 0x6d
	frameHeaderLen = 6
	// MaxFrame is the largest payload in bytes, MaxText the largest text.
	MaxFrame = 32 << 10
	MaxText  = 4096
	// SerialFrame and SerialCredit are what a guest sends at a time, and allows
	// the host to send before it asks for more, on a serial port. They fit the
	// buffers of its driver, so that nothing is lost when the command does not
	// read, and a signal does not wait long behind data.
	SerialFrame  = 4096
	SerialCredit = 2048
	// MaxCredit is the same on faster lines, and the most a host believes.
	MaxCredit = 32 << 10
	// maxGarbage is how many bytes that belong to no frame are tolerated.
	maxGarbage = 1 << 20
)

// ErrLine says that what arrives on the control line makes no sense.
var ErrLine = errors.New("control line: what the guest sends is not understood")

// A Frame is one message of the control line.
type Frame struct {
	Kind    FrameKind
	Payload []byte // valid until the next frame is read
}

// AppendFrame appends the wire form of a frame; the payload must not be longer
// than MaxFrame.
func AppendFrame(b []byte, kind FrameKind, payload []byte) []byte {
	start := len(b)
	b = append(b, frameMagic0, frameMagic1, byte(kind))
	b = binary.LittleEndian.AppendUint16(b, uint16(len(payload)))
	b = append(b, frameCheck(b[start:]))
	return append(b, payload...)
}

func frameCheck(header []byte) byte {
	var sum byte
	for _, c := range header[:5] {
		sum += c
	}
	return ^sum
}

// A FrameReader takes frames off a byte stream.
type FrameReader struct {
	r       *bufio.Reader
	garbage int64 // bytes skipped so far
	buf     [MaxFrame]byte
}

// NewFrameReader returns a reader of the frames in r.
func NewFrameReader(r io.Reader) *FrameReader {
	return &FrameReader{r: bufio.NewReaderSize(r, 2*MaxFrame)}
}

// Next returns the next frame. Bytes in front of it that are none are counted
// and skipped; too many of them end with an error that matches ErrLine.
func (f *FrameReader) Next() (Frame, error) {
	for {
		h, err := f.r.Peek(frameHeaderLen)
		if err != nil {
			f.garbage += int64(len(h))
			if errors.Is(err, io.EOF) && len(h) > 0 {
				_, _ = f.r.Discard(len(h))
			}
			return Frame{}, err
		}
		n := int(binary.LittleEndian.Uint16(h[3:]))
		if h[0] != frameMagic0 || h[1] != frameMagic1 || h[5] != frameCheck(h) || n > MaxFrame {
			_, _ = f.r.Discard(1)
			if f.garbage++; f.garbage > maxGarbage {
				return Frame{}, fmt.Errorf("%w: more than %d bytes outside of frames", ErrLine, maxGarbage)
			}
			continue
		}
		kind := FrameKind(h[2])
		_, _ = f.r.Discard(frameHeaderLen)
		if _, err := io.ReadFull(f.r, f.buf[:n]); err != nil {
			return Frame{}, err
		}
		return Frame{kind, f.buf[:n]}, nil
	}
}
