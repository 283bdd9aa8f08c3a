package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// maxWindow bounds how far a zstd frame may look back: what every decoder should be able to (RFC 8878, section 3.1.1.1.2). QEMU's frames
// name one of 2 MiB also for small clusters; memory is taken for the cluster only.
const maxWindow = 8 << 20

// unpackers is how many clusters are decompressed at the same time at most.
const unpackers = 8

// unpacker decompresses the clusters whose number modulo unpackers is its own, one after the other: so nobody decompresses a cluster that
// somebody else is about to have.
type unpacker struct {
	mu    sync.Mutex
	in    []byte
	src   bytes.Reader
	flate io.ReadCloser
	zstd  *zstd.Decoder
}

func (u *unpacker) close() {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.zstd != nil {
		u.zstd.Close()
	}
	u.in, u.flate, u.zstd = nil, nil, nil
}

// readPacked reads compressed clusters, several at the same time when p is large.
func (m *Image) readPacked(p []byte, off int64) error {
	first, last := off>>m.hdr.clusterBits, (off+int64(len(p))-1)>>m.hdr.clusterBits
	if workers := min(last-first+1, int64(runtime.GOMAXPROCS(0)), unpackers); workers > 1 {
		return m.readParallel(p, off, first, last, int(workers))
	}
	for c := first; c <= last; c++ {
		if err := m.readPart(p, off, c); err != nil {
			return err
		}
	}
	return nil
}

// readParallel is readPacked by several goroutines; it returns when all of them are done.
func (m *Image) readParallel(p []byte, off, first, last int64, workers int) error {
	var next atomic.Int64
	var wg sync.WaitGroup
	next.Store(first)
	errs := make([]error, workers)
	for w := range workers {
		wg.Go(func() {
			for c := next.Add(1) - 1; c <= last && errs[w] == nil; c = next.Add(1) - 1 {
				errs[w] = m.readPart(p, off, c)
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// readPart reads the part of p, which begins at off, that lies in cluster c.
func (m *Image) readPart(p []byte, off, c int64) error {
	start := c << m.hdr.clusterBits
	from, to := max(off, start), min(off+int64(len(p)), start+m.hdr.ClusterSize)
	return m.readCluster(p[from-off:to-off], c, from-start)
}

// readCluster reads from byte `from` on in the compressed cluster c.
func (m *Image) readCluster(p []byte, c, from int64) error {
	if b := m.clusters.get(c); b != nil {
		copy(p, b[from:])
		return nil
	}
	u := &m.unpackers[c%unpackers]
	u.mu.Lock()
	defer u.mu.Unlock()
	if m.closed.Load() {
		return m.fail("", ErrClosed, "", "")
	}
	b := m.clusters.get(c)
	if b != nil {
		copy(p, b[from:])
		return nil
	}
	// Who reads a whole cluster keeps it himself.
	if int64(len(p)) == m.hdr.ClusterSize {
		return m.unpack(u, p, c)
	}
	b = make([]byte, m.hdr.ClusterSize)
	if err := m.unpack(u, b, c); err != nil {
		return err
	}
	m.clusters.put(c, b)
	copy(p, b[from:])
	return nil
}

// unpack decompresses cluster c into out, which is as large as a cluster.
func (m *Image) unpack(u *unpacker, out []byte, c int64) error {
	off := c << m.hdr.clusterBits
	s, err := m.slice(off)
	if err != nil {
		return err
	}
	e := s[off%m.sliceSpan>>m.hdr.clusterBits*m.words]
	x := 62 - (m.hdr.clusterBits - 8)
	pos := int64(e & (1<<x - 1))
	n := int64(e&^(3<<62)>>x+1)*512 - pos&511
	if pos >= m.fileSize {
		return m.fail("compressed cluster", ErrTruncated, fmt.Sprintf("at %d, the file has %d bytes", pos, m.fileSize), "get it anew")
	}
	n = min(n, m.fileSize-pos) // the last sector need not be whole
	if int64(cap(u.in)) < n {
		u.in = make([]byte, n)
	}
	u.in = u.in[:n]
	if err := readExact(m.file, u.in, pos); err != nil {
		return m.wrap("compressed cluster", ErrRead, err)
	}
	if m.hdr.Compression == Zstd {
		err = u.unzstd(out)
	} else {
		err = u.inflate(out)
	}
	if err != nil {
		return &Error{Name: m.name, Field: "compressed cluster", Kind: ErrCompressed, Detail: fmt.Sprintf("byte %d of the disk, %d bytes at %d of the file", off, n, pos), Err: err, Remedy: "get it anew"}
	}
	return nil
}

// inflate fills out from the raw deflate stream at the beginning of u.in. What follows out in the stream does not count.
func (u *unpacker) inflate(out []byte) error {
	u.src.Reset(u.in)
	if u.flate == nil {
		u.flate = flate.NewReader(&u.src)
	} else if err := u.flate.(flate.Resetter).Reset(&u.src, nil); err != nil {
		return err
	}
	_, err := io.ReadFull(u.flate, out)
	return err
}

// unzstd fills out from the zstd frame at the beginning of u.in.
func (u *unpacker) unzstd(out []byte) error {
	frame, err := zstdFrame(u.in)
	if err != nil {
		return err
	}
	if u.zstd == nil {
		u.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxMemory(maxWindow), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return err
		}
	}
	b, err := u.zstd.DecodeAll(frame, out[:0:len(out)])
	if err != nil {
		return err
	}
	if len(b) != len(out) {
		return fmt.Errorf("%d bytes instead of %d", len(b), len(out))
	}
	if &b[0] != &out[0] {
		copy(out, b)
	}
	return nil
}

// zstdFrame is the frame that b begins with: only its blocks tell how long it is (RFC 8878, section 3.1.1).
func zstdFrame(b []byte) ([]byte, error) {
	var h zstd.Header
	if err := h.Decode(b); err != nil {
		return nil, err
	}
	if h.Skippable {
		return nil, zstd.ErrMagicMismatch
	}
	for pos := h.HeaderSize; len(b)-pos >= 3; {
		block := uint32(binary.LittleEndian.Uint16(b[pos:])) | uint32(b[pos+2])<<16
		size := int(block >> 3)
		if block>>1&3 == 1 { // one byte, repeated
			size = 1
		}
		if pos += 3 + size; block&1 == 0 {
			continue
		}
		if h.HasCheckSum {
			pos += 4
		}
		if pos <= len(b) {
			return b[:pos], nil
		}
		break
	}
	return nil, io.ErrUnexpectedEOF
}
