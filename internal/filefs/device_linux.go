package filefs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/virtio"
)

const (
	// DeviceID is the virtio device type of a file system.
	DeviceID = 26
	// MaxTag is the longest name of a file system in bytes.
	MaxTag = 36
	// QueueSize is the size of each queue in descriptors. A request has at most
	// so many pieces.
	QueueSize = 256
	// numQueues counts the high priority queue and one of requests.
	numQueues = 2
)

// Device shows files. It implements virtio.Device.
type Device struct {
	config [MaxTag + 4]byte
	files  []*os.File
}

var _ virtio.Device = (*Device)(nil)

// New returns a device that is mounted by the tag and shows the files, which
// must be regular and stay the caller's, open for as long as it is served.
func New(tag string, files []*os.File) (*Device, error) {
	if tag == "" || len(tag) > MaxTag {
		return nil, fmt.Errorf("filefs: a tag has 1 to %d bytes, not %q", MaxTag, tag)
	}
	for _, f := range files {
		switch st, err := f.Stat(); {
		case err != nil:
			return nil, fmt.Errorf("filefs: %w", err)
		case !st.Mode().IsRegular():
			return nil, fmt.Errorf("filefs: %s is not a regular file", f.Name())
		}
	}
	d := &Device{files: files}
	copy(d.config[:MaxTag], tag)
	binary.LittleEndian.PutUint32(d.config[MaxTag:], numQueues-1)
	return d, nil
}

// ID returns DeviceID.
func (d *Device) ID() uint32 { return DeviceID }

// Features returns none.
func (d *Device) Features() uint64 { return 0 }

// QueueSizes returns the sizes of the high priority queue and the request queue.
func (d *Device) QueueSizes() []uint16 { return []uint16{QueueSize, QueueSize} }

// ReadConfig reads the tag, padded with zeros, and the number of request queues.
func (d *Device) ReadConfig(off uint32, p []byte) {
	clear(p)
	if uint64(off) < uint64(len(d.config)) {
		copy(p, d.config[off:])
	}
}

// WriteConfig ignores the write: there is nothing to be written.
func (d *Device) WriteConfig(off uint32, p []byte) {}

// Activate has nothing to do.
func (d *Device) Activate(features uint64, notify virtio.ConfigNotifier) error { return nil }

// Reset has nothing to do: no request leaves anything behind but in the files.
func (d *Device) Reset() {}

// ServeQueue serves requests one after the other.
func (d *Device) ServeQueue(i int, q *virtio.Queue) error {
	if i >= numQueues {
		return fmt.Errorf("filefs: there is no queue %d", i)
	}
	return virtio.CatchFault(func() error {
		s := &server{files: d.files}
		for q.Wait() {
			for {
				c, err := q.Next()
				if err != nil {
					return err
				}
				if c == nil {
					break
				}
				s.serve(c.Reader(), c.Writer())
				q.Push(c)
			}
			q.Notify()
		}
		return nil
	})
}

// server serves the requests of one queue.
type server struct {
	files   []*os.File
	request [inHeaderSize + maxArgs]byte
	reply   [outHeaderSize + maxReply]byte
	pieces  [][]byte // of guest memory; scratch
}

// serve answers one request. What has no header, or no room for the answer's,
// gets none.
func (s *server) serve(r *virtio.ChainReader, w *virtio.ChainWriter) {
	header := s.request[:inHeaderSize]
	if _, err := io.ReadFull(r, header); err != nil {
		return
	}
	in := decoder{b: header}
	in.u32() // the length; the chain says it too
	c := call{op: in.u32(), unique: in.u64(), node: in.u64(), r: r, w: w}
	if c.op == opForget || c.op == opBatchForget || c.op == opInterrupt || w.Len() < outHeaderSize {
		return
	}
	out := encoder{b: s.reply[:outHeaderSize]}
	data, err := s.do(&c, &out)
	if err != nil {
		out.b, data = out.b[:outHeaderSize], 0
	}
	if w.Len() < len(out.b)+data {
		out.b, data, err = out.b[:outHeaderSize], 0, unix.EIO
	}
	binary.LittleEndian.PutUint32(out.b, uint32(len(out.b)+data))
	binary.LittleEndian.PutUint32(out.b[4:], uint32(-int32(errnoOf(err))))
	binary.LittleEndian.PutUint64(out.b[8:], c.unique)
	_, _ = w.Write(out.b) // fits
	_ = w.Wrote(data)
}

// call is one request.
type call struct {
	op           uint32
	unique, node uint64
	r            *virtio.ChainReader // what follows the header
	w            *virtio.ChainWriter // from the answer's header on
}

// errnoOf is the error as FUSE says it; 0 is none.
func errnoOf(err error) unix.Errno {
	var errno unix.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &errno) && errno > 0 && errno < 512:
		return errno
	}
	return unix.EIO
}
