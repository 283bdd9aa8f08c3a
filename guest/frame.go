package guest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// The control line carries frames in both directions:
//
//	byte 0, 1   0xA6 0x6D
//	byte 2      frameType
//	byte 3, 4   payload length, little endian, at most maxFrame
//	byte 5      check: the sum of bytes 0 to 4, inverted
//	byte 6…     payload
//
// A serial line may have bytes on it that no init wrote (a driver that probes
// the chip, a program of the guest that opened the port), so a reader that
// does not find a frame where one should be looks for the next one.

type frameType byte

const (
	// From the guest.
	frameHello  frameType = 1 // JSON helloFrame; the first
	frameStdout frameType = 2 // bytes
	frameStderr frameType = 3 // bytes
	frameExit   frameType = 4 // uint32 status, uint32 signal (0: none)
	frameError  frameType = 5 // JSON GuestError: nothing will come of it
	frameWarn   frameType = 6 // text: something is missing, but not needed
	frameStart  frameType = 7 // the command or the disk's init starts now; text: which
	frameCredit frameType = 8 // uint32: that many more bytes of stdin are welcome
	frameBye    frameType = 9 // the guest is about to switch off

	// From the host.
	frameStdin    frameType = 33 // bytes, within the credit
	frameStdinEOF frameType = 34
	frameResize   frameType = 35 // uint16 rows, uint16 columns
	frameSignal   frameType = 36 // uint8
)

const (
	frameMagic0    = 0xa6
	frameMagic1    = 0x6d
	frameHeaderLen = 6
	// maxFrame is the largest payload in bytes, maxText the largest text.
	maxFrame = 32 << 10
	maxText  = 4096
	// serialFrame and serialCredit are what a guest sends at a time, and allows
	// the host to send before it asks for more, on a serial port. They fit the
	// buffers of its driver, so that nothing is lost when the command does not
	// read, and a signal does not wait long behind data.
	serialFrame  = 4096
	serialCredit = 2048
	// maxCredit is the same on faster lines, and the most a host believes.
	maxCredit = 32 << 10
	// maxGarbage is how many bytes that belong to no frame are tolerated.
	maxGarbage = 1 << 20
)

// ErrControl says that what arrives on the control line makes no sense.
var ErrControl = errors.New("control line: what the guest sends is not understood")

type frame struct {
	kind    frameType
	payload []byte // valid until the next frame is read
}

// appendFrame appends the wire form of a frame; the payload must not be longer
// than maxFrame.
func appendFrame(b []byte, kind frameType, payload []byte) []byte {
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

// frameReader takes frames off a byte stream.
type frameReader struct {
	r       *bufio.Reader
	garbage int64 // bytes skipped so far
	buf     [maxFrame]byte
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{r: bufio.NewReaderSize(r, 2*maxFrame)}
}

// next returns the next frame. Bytes in front of it that are none are counted
// and skipped; too many of them end with an error that matches ErrControl.
func (f *frameReader) next() (frame, error) {
	for {
		h, err := f.r.Peek(frameHeaderLen)
		if err != nil {
			f.garbage += int64(len(h))
			if errors.Is(err, io.EOF) && len(h) > 0 {
				_, _ = f.r.Discard(len(h))
			}
			return frame{}, err
		}
		n := int(binary.LittleEndian.Uint16(h[3:]))
		if h[0] != frameMagic0 || h[1] != frameMagic1 || h[5] != frameCheck(h) || n > maxFrame {
			_, _ = f.r.Discard(1)
			if f.garbage++; f.garbage > maxGarbage {
				return frame{}, fmt.Errorf("%w: more than %d bytes outside of frames", ErrControl, maxGarbage)
			}
			continue
		}
		kind := frameType(h[2])
		_, _ = f.r.Discard(frameHeaderLen)
		if _, err := io.ReadFull(f.r, f.buf[:n]); err != nil {
			return frame{}, err
		}
		return frame{kind, f.buf[:n]}, nil
	}
}
