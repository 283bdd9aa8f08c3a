package virtioblk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/moovm/moovm/virtio"
)

// Config says what kind of block device is built.
type Config struct {
	Backend   Backend
	ReadOnly  bool   // offer VIRTIO_BLK_F_RO and refuse every write
	Serial    string // GET_ID, at most 20 bytes; "" asks the backend
	Queues    int    // request queues, at most 256; 0 means 1
	QueueSize uint16 // descriptors per queue, a power of two from 4 on; 0 means 256
	// Workers bounds the requests of one queue that are handled at the same
	// time; 0 means 32.
	Workers int
	// Limit bounds the load on the backend; zero fields mean no bound.
	Limit Limit
	// Logger receives backend errors; nil discards them.
	Logger *slog.Logger
}

// Device is a virtio block device. Its virtio.Device methods belong to the
// transport; Stats, Resized and SetLimit may be called at any time.
type Device struct {
	backend   capabilities
	readOnly  bool
	serial    [serialSize]byte
	queues    int
	queueSize uint16
	workers   int
	log       *slog.Logger
	warned    atomic.Bool
	limiter   limiter
	counters  []counters

	capacity     atomic.Uint64 // sectors
	features     atomic.Uint64 // negotiated
	writeThrough atomic.Bool   // each write ends with a flush

	mu        sync.Mutex
	writeback bool // the config field of CONFIG_WCE
	notify    virtio.ConfigNotifier
}

var _ virtio.Device = (*Device)(nil)

// New returns a block device over c.Backend, which the caller closes after the
// transport is closed.
func New(c Config) (*Device, error) {
	if c.Backend == nil {
		return nil, errors.New("virtioblk: Config.Backend is missing")
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.QueueSize == 0 {
		c.QueueSize = 256
	}
	if c.Workers == 0 {
		c.Workers = 32
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	switch {
	case c.Queues < 1 || c.Queues > 256:
		return nil, fmt.Errorf("virtioblk: Config.Queues is %d, want 1 to 256", c.Queues)
	case c.QueueSize < 4 || c.QueueSize > 1024 || c.QueueSize&(c.QueueSize-1) != 0:
		return nil, fmt.Errorf("virtioblk: Config.QueueSize is %d, want a power of two from 4 to 1024", c.QueueSize)
	case c.Workers < 1:
		return nil, fmt.Errorf("virtioblk: Config.Workers is %d, want at least 1", c.Workers)
	}
	if err := c.Limit.check(); err != nil {
		return nil, err
	}
	size := c.Backend.Size()
	if size < 0 {
		return nil, fmt.Errorf("virtioblk: the backend's size is %d", size)
	}
	if s, ok := c.Backend.(Serialer); ok && c.Serial == "" {
		c.Serial = s.Serial()
	}
	if len(c.Serial) > serialSize {
		return nil, fmt.Errorf("virtioblk: serial %q is longer than %d bytes", c.Serial, serialSize)
	}
	d := &Device{
		backend:   lookup(c.Backend),
		readOnly:  c.ReadOnly,
		queues:    c.Queues,
		queueSize: c.QueueSize,
		workers:   c.Workers,
		log:       c.Logger,
		counters:  make([]counters, c.Queues),
		writeback: true,
	}
	copy(d.serial[:], c.Serial)
	d.capacity.Store(uint64(size) / sectorSize)
	d.limiter.set(c.Limit)
	return d, nil
}

// ID implements virtio.Device.
func (d *Device) ID() uint32 { return virtio.IDBlock }

// Features implements virtio.Device.
func (d *Device) Features() uint64 {
	f := FeatureSizeMax | FeatureSegMax | FeatureBlkSize | FeatureTopology | FeatureFlush
	if d.queues > 1 {
		f |= FeatureMQ
	}
	if d.readOnly {
		return f | FeatureReadOnly
	}
	f |= FeatureConfigWCE
	if d.backend.discard != nil {
		f |= FeatureDiscard
	}
	if d.backend.zeroes != nil {
		f |= FeatureWriteZeroes
	}
	return f
}

// QueueSizes implements virtio.Device.
func (d *Device) QueueSizes() []uint16 {
	s := make([]uint16, d.queues)
	for i := range s {
		s[i] = d.queueSize
	}
	return s
}

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(off uint32, p []byte) {
	var b [cfgLen]byte
	le := binary.LittleEndian
	le.PutUint32(b[cfgSizeMax:], sizeMax)
	le.PutUint32(b[cfgSegMax:], uint32(d.queueSize)-2) // header and status take one each
	le.PutUint32(b[cfgBlkSize:], sectorSize)
	b[cfgPhysicalExp] = physicalBlockExp
	le.PutUint16(b[cfgMinIO:], 1<<physicalBlockExp) // in logical blocks, as the next
	le.PutUint32(b[cfgOptIO:], 0)
	le.PutUint16(b[cfgNumQueues:], uint16(d.queues))
	if d.backend.discard != nil && !d.readOnly {
		le.PutUint32(b[cfgDiscardMax:], maxSegmentSectors)
		le.PutUint32(b[cfgDiscardSegs:], maxSegments)
		le.PutUint32(b[cfgDiscardAlign:], 1<<physicalBlockExp)
	}
	if d.backend.zeroes != nil && !d.readOnly {
		le.PutUint32(b[cfgZeroesMax:], maxSegmentSectors)
		le.PutUint32(b[cfgZeroesSegs:], maxSegments)
		b[cfgZeroesUnmap] = 1
	}
	d.mu.Lock()
	le.PutUint64(b[cfgCapacity:], d.capacity.Load())
	if d.writeback && !d.readOnly {
		b[cfgWriteback] = 1
	}
	d.mu.Unlock()
	clear(p)
	if off < cfgLen {
		copy(p, b[off:])
	}
}

// WriteConfig implements virtio.Device. Only the cache mode is writable, and
// only with CONFIG_WCE negotiated.
func (d *Device) WriteConfig(off uint32, p []byte) {
	if off != cfgWriteback || len(p) != 1 || d.features.Load()&FeatureConfigWCE == 0 || p[0] > 1 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.writeback = p[0] == 1
	d.writeThrough.Store(!d.writeback)
	if !d.writeback {
		// What was written back so far must not stay behind.
		if err := d.backend.Flush(); err != nil {
			d.warn("flush", 0, 0, err)
		}
	}
}

// Activate implements virtio.Device.
func (d *Device) Activate(features uint64, notify virtio.ConfigNotifier) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.features.Store(features)
	d.notify = notify
	// A driver that knows neither FLUSH nor the cache mode believes that a
	// completed write is on stable storage (section 5.2.6.2).
	d.writeThrough.Store(features&(FeatureFlush|FeatureConfigWCE) == 0 || !d.writeback)
	return nil
}

// Reset implements virtio.Device.
func (d *Device) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.features.Store(0)
	d.writeback = true
	d.writeThrough.Store(false)
	d.notify = nil
}

// Resized takes over a new size of the backend, while the device is running:
// the driver sees the new capacity, a new configuration generation and a
// configuration interrupt. Requests beyond a smaller size fail from now on;
// the backend must still tolerate those in flight.
func (d *Device) Resized() error {
	size := d.backend.Size()
	if size < 0 {
		return fmt.Errorf("virtioblk: the backend's size is %d", size)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	sectors := uint64(size) / sectorSize
	if sectors == d.capacity.Load() {
		return nil
	}
	// The generation goes up first, while ReadConfig has to wait for d.mu:
	// a driver can never see both halves of different capacities within one
	// generation.
	if d.notify != nil {
		d.notify.ConfigChanged()
	}
	d.capacity.Store(sectors)
	return nil
}

// PendingLen and SharePending are the backend's (PendingSharer), for a
// transport whose driver outlives this process: virtio/vhostuser uses them. A
// backend that keeps nothing to itself needs no memory.
func (d *Device) PendingLen() int64 {
	if d.backend.pending == nil {
		return 0
	}
	return d.backend.pending.PendingLen()
}

// SharePending is described at PendingLen.
func (d *Device) SharePending(mem []byte) error {
	if d.backend.pending == nil {
		return nil
	}
	return d.backend.pending.SharePending(mem)
}

// warn logs the first backend error loudly and the rest in a whisper: a guest
// that hits a bad disk retries a lot.
func (d *Device) warn(op string, sector uint64, n int, err error) {
	level := slog.LevelDebug
	if d.warned.CompareAndSwap(false, true) {
		level = slog.LevelWarn
	}
	if d.log.Enabled(context.Background(), level) {
		d.log.Log(context.Background(), level, "virtioblk: backend error, the guest sees an I/O error",
			"op", op, "sector", sector, "bytes", n, "error", err)
	}
}
