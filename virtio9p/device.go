package virtio9p

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/internal/ratelog"
	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio9p/fence"
)

const (
	// DeviceID is the virtio device type of a 9P transport.
	DeviceID = 9
	// FeatureMountTag says that the configuration space holds the tag
	// (VIRTIO_9P_MOUNT_TAG is bit 0).
	FeatureMountTag = 1 << 0
	// QueueSize is the size of the one queue in descriptors, which is also the
	// most Linux makes use of (VIRTQUEUE_NUM in net/9p/trans_virtio.c).
	QueueSize = 128
	// MaxTag is the longest tag in bytes. Linux takes more, mount(8) and its
	// users do not: QEMU's limit (MAX_TAG_LEN) is kept.
	MaxTag = 32
)

// Errors of New.
var (
	ErrTag      = errors.New("virtio9p: unusable tag")
	ErrAttacher = errors.New("virtio9p: no file tree to serve")
)

// Config says what a device serves.
type Config struct {
	// Tag is the name the guest mounts it by: 1 to MaxTag bytes, without NUL
	// and slash.
	Tag string
	// Attacher is the file tree.
	Attacher p9.Attacher
	// MaxMsize bounds the message size in bytes that the guest may ask for;
	// 0 means fence.DefaultMsize (500 KiB).
	MaxMsize uint32
	// MaxFIDs bounds the files the guest may refer to at a time; 0 means
	// fence.DefaultFIDs.
	MaxFIDs int
	// Logger hears of what should not happen; nil means nobody does.
	Logger *slog.Logger
}

// Device is a virtio 9P device. It implements virtio.Device.
type Device struct {
	tag    string
	config []byte // the configuration space
	fence  fence.Config

	mu      sync.Mutex
	session *fence.Session // from the first queue or SetState to Reset

	requests, requestBytes, replyBytes atomic.Uint64
}

// Stats are a device's counters since it was built.
type Stats struct {
	Tag          string // the device's
	Requests     uint64 // answered
	RequestBytes uint64 // from the guest
	ReplyBytes   uint64 // to the guest
}

// ReportStats implements virtio.StatsReporter: it returns Stats.
func (d *Device) ReportStats() any { return d.Stats() }

// Stats returns the counters. It may be called at any time.
func (d *Device) Stats() Stats {
	return Stats{Tag: d.tag, Requests: d.requests.Load(), RequestBytes: d.requestBytes.Load(), ReplyBytes: d.replyBytes.Load()}
}

var _ virtio.Device = (*Device)(nil)

// New returns a device. Errors are ErrTag and ErrAttacher, explained.
func New(c Config) (*Device, error) {
	switch {
	case c.Tag == "":
		return nil, fmt.Errorf("%w: it is empty; name what the guest shall mount", ErrTag)
	case len(c.Tag) > MaxTag:
		return nil, fmt.Errorf("%w: %.40q is longer than %d bytes", ErrTag, c.Tag, MaxTag)
	case strings.ContainsAny(c.Tag, "\x00/"):
		return nil, fmt.Errorf("%w: %q contains a slash or NUL", ErrTag, c.Tag)
	case c.Attacher == nil:
		return nil, ErrAttacher
	}
	d := &Device{tag: c.Tag, fence: fence.Config{Attacher: c.Attacher, MaxMsize: c.MaxMsize, MaxFIDs: c.MaxFIDs, Logger: ratelog.New(c.Logger)}}
	d.config = binary.LittleEndian.AppendUint16(nil, uint16(len(c.Tag)))
	d.config = append(d.config, c.Tag...)
	return d, nil
}

// ID returns DeviceID.
func (d *Device) ID() uint32 { return DeviceID }

// Features returns FeatureMountTag.
func (d *Device) Features() uint64 { return FeatureMountTag }

// QueueSizes returns the size of the one queue.
func (d *Device) QueueSizes() []uint16 { return []uint16{QueueSize} }

// ReadConfig reads the tag's length (2 bytes, little-endian) and the tag.
func (d *Device) ReadConfig(off uint32, p []byte) {
	clear(p)
	if uint64(off) < uint64(len(d.config)) {
		copy(p, d.config[off:])
	}
}

// WriteConfig ignores the write: there is nothing to be written.
func (d *Device) WriteConfig(off uint32, p []byte) {}

// Activate has nothing to do: the session starts with the queue.
func (d *Device) Activate(features uint64, notify virtio.ConfigNotifier) error { return nil }

// Reset ends the session: every file is closed.
func (d *Device) Reset() { d.end() }

func (d *Device) end() {
	d.mu.Lock()
	s := d.session
	d.session = nil
	d.mu.Unlock()
	if s != nil {
		s.Close()
	}
}

// begin returns the session there is, or a fresh one.
func (d *Device) begin() *fence.Session {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.session == nil {
		d.session = fence.NewSession(d.fence)
	}
	return d.session
}

// State implements virtio.StateKeeper: where the session's fids lead, as JSON.
func (d *Device) State() ([]byte, error) {
	st, err := d.begin().State()
	if err != nil {
		return nil, err
	}
	return json.Marshal(st)
}

// SetState implements virtio.StateKeeper: it opens the session's files again by
// their names. Those that are gone, or are other files now, answer ESTALE, and
// are counted in the log once.
func (d *Device) SetState(p []byte) error {
	d.end()
	if len(p) == 0 {
		return nil
	}
	var st fence.State
	if err := json.Unmarshal(p, &st); err != nil {
		return fmt.Errorf("%w: %w", fence.ErrState, err)
	}
	if _, err := d.begin().Restore(st); err != nil {
		d.end()
		return err
	}
	return nil
}

var _ virtio.StateKeeper = (*Device)(nil)

// ServeQueue serves the session, a 9P server. Every request is answered when
// it returns; the files stay open until Reset, so that a queue that is
// suspended can go on.
func (d *Device) ServeQueue(i int, q *virtio.Queue) (err error) {
	if i != 0 {
		return fmt.Errorf("virtio9p: there is no queue %d", i)
	}
	s := d.begin()
	v := &serving{d: d, q: q}
	defer func() { // also of a fault in here
		s.Drain()
		if fault := v.fault.Load(); fault != nil {
			err = *fault
		}
		if err != nil {
			d.end() // a broken ring is not served again
		}
	}()
	for q.Wait() {
		for {
			c, err := q.Next()
			if err != nil {
				return err
			}
			if c == nil {
				break
			}
			r, w := c.Reader(), c.Writer()
			s.Submit(&exchange{v: v, c: c, r: r, w: w}, r.Len(), w.Len())
		}
	}
	return nil
}

// serving is what the chains of a queue have in common.
type serving struct {
	d     *Device
	q     *virtio.Queue
	fault atomic.Pointer[error] // guest memory was gone
}

// guard calls f, which touches guest memory, in any goroutine.
func (v *serving) guard(f func() error) error {
	err := virtio.CatchFault(f)
	if errors.Is(err, virtio.ErrFault) {
		fault := err // err itself would be allocated for each call
		v.fault.CompareAndSwap(nil, &fault)
		v.q.Stop()
	}
	return err
}

// exchange is a chain as the session sees it.
type exchange struct {
	v *serving
	c *virtio.DescriptorChain
	r *virtio.ChainReader
	w *virtio.ChainWriter
}

var _ fence.Spans = (*exchange)(nil)

func (x *exchange) Read(p []byte) (n int, err error) {
	err = x.v.guard(func() (err error) {
		n, err = x.r.Read(p)
		return err
	})
	x.v.d.requestBytes.Add(uint64(n))
	return n, err
}

func (x *exchange) Write(p []byte) (n int, err error) {
	err = x.v.guard(func() (err error) {
		n, err = x.w.Write(p)
		return err
	})
	x.v.d.replyBytes.Add(uint64(n))
	return n, err
}

func (x *exchange) Readable(n int, dst [][]byte) ([][]byte, error) {
	dst, err := x.r.Buffers(n, dst)
	if err == nil {
		x.v.d.requestBytes.Add(uint64(n))
	}
	return dst, err
}

func (x *exchange) Writable(skip, n int, dst [][]byte) ([][]byte, error) {
	w := *x.w
	if err := w.Wrote(skip); err != nil {
		return dst, err
	}
	return w.Buffers(n, dst)
}

func (x *exchange) Wrote(n int) {
	if x.w.Wrote(n) == nil {
		x.v.d.replyBytes.Add(uint64(n))
	}
}

// Done returns the chain. Replies come one by one from different goroutines,
// so each notifies by itself; EVENT_IDX keeps that cheap.
func (x *exchange) Done() {
	x.v.d.requests.Add(1)
	x.v.guard(func() error {
		x.v.q.Push(x.c)
		x.v.q.Notify()
		return nil
	})
}
