package virtionet

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Recorder is a Link that writes the frames which pass through another one, in
// both directions, to a pcap file. Checksums that were left to the receiver
// are complete there.
type Recorder struct {
	link Link

	mu  sync.Mutex
	w   io.Writer
	buf []byte
	err error // the first one of w; nothing is written behind it
}

// The pcap format (draft-ietf-opsawg-pcap): times in nanoseconds, Ethernet.
const (
	pcapMagic    = 0xa1b23c4d
	pcapHeader   = 24
	pcapRecord   = 16
	pcapEthernet = 1
)

// NewRecorder returns a recorder of l, which it closes, that writes to w, each
// frame with one Write.
func NewRecorder(l Link, w io.Writer) (*Recorder, error) {
	var h [pcapHeader]byte
	le.PutUint32(h[0:], pcapMagic)
	le.PutUint16(h[4:], 2) // version 2.4
	le.PutUint16(h[6:], 4)
	le.PutUint32(h[16:], maxFrame)
	le.PutUint32(h[20:], pcapEthernet)
	if _, err := w.Write(h[:]); err != nil {
		return nil, fmt.Errorf("virtionet: packets cannot be recorded: %w", err)
	}
	return &Recorder{link: l, w: w, buf: make([]byte, pcapRecord+maxFrame)}, nil
}

func (r *Recorder) record(packet []byte) {
	if len(packet) < HeaderSize+ethHeader || len(packet) > HeaderSize+maxFrame {
		return
	}
	h, f := packet[:HeaderSize], packet[HeaderSize:]
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return
	}
	now := time.Now()
	b := r.buf[:pcapRecord+len(f)]
	le.PutUint32(b[0:], uint32(now.Unix()))
	le.PutUint32(b[4:], uint32(now.Nanosecond()))
	le.PutUint32(b[8:], uint32(len(f)))
	le.PutUint32(b[12:], uint32(len(f)))
	copy(b[pcapRecord:], f)
	if start := int(le.Uint16(h[hdrCsumStart:])); h[hdrFlags]&flagNeedsCsum != 0 &&
		start >= ethHeader && start+int(le.Uint16(h[hdrCsumOffset:]))+2 <= len(f) {
		completeChecksum(b[pcapRecord:], h)
	}
	if _, err := r.w.Write(b); err != nil {
		r.err = fmt.Errorf("virtionet: packets can no longer be recorded: %w", err)
	}
}

// recorded is the device behind a Recorder.
type recorded struct {
	Receiver
	rec *Recorder
}

func (d recorded) Receive(packet []byte) bool {
	d.rec.record(packet)
	return d.Receiver.Receive(packet)
}

// Attach implements Link.
func (r *Recorder) Attach(d Receiver) error { return r.link.Attach(recorded{d, r}) }

// Send implements Link.
func (r *Recorder) Send(packet []byte) {
	r.record(packet)
	r.link.Send(packet)
}

// Offloads implements Link.
func (r *Recorder) Offloads() Offloads { return r.link.Offloads() }

// Close closes the link that was recorded; its error is also that of the first
// frame which could not be written. The writer is the caller's.
func (r *Recorder) Close() error {
	err := r.link.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	return errors.Join(err, r.err)
}
