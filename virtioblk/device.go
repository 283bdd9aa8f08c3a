package virtioblk

import (
	"log/slog"

	"github.com/moovm/moovm/virtio"
)

// Config says what kind of block device is built.
type Config struct {
	Backend   Backend
	ReadOnly  bool   // offer VIRTIO_BLK_F_RO and refuse every write
	Serial    string // GET_ID, at most 20 bytes; "" asks the backend
	Queues    int    // request queues; 0 means 1
	QueueSize uint16 // descriptors per queue, a power of two; 0 means 256
	Logger    *slog.Logger
}

// Device is a virtio block device.
type Device struct{}

var _ virtio.Device = (*Device)(nil)

// New returns a block device over c.Backend.
func New(c Config) (*Device, error) { return &Device{}, nil }

// ID implements virtio.Device.
func (d *Device) ID() uint32 { return virtio.IDBlock }

// Features implements virtio.Device.
func (d *Device) Features() uint64 { return 0 }

// QueueSizes implements virtio.Device.
func (d *Device) QueueSizes() []uint16 { return nil }

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(off uint32, p []byte) {}

// WriteConfig implements virtio.Device.
func (d *Device) WriteConfig(off uint32, p []byte) {}

// Activate implements virtio.Device.
func (d *Device) Activate(features uint64, notify virtio.ConfigNotifier) error { return nil }

// ServeQueue implements virtio.Device.
func (d *Device) ServeQueue(i int, q *virtio.Queue) error { return nil }

// Reset implements virtio.Device.
func (d *Device) Reset() {}

// Stats are a device's counters since it was built.
type Stats struct {
	Reads       uint64 `json:"reads"`
	Writes      uint64 `json:"writes"`
	Flushes     uint64 `json:"flushes"`
	Discards    uint64 `json:"discards"`
	WriteZeroes uint64 `json:"write_zeroes"`

	ReadBytes        uint64 `json:"read_bytes"`
	WriteBytes       uint64 `json:"write_bytes"`
	DiscardBytes     uint64 `json:"discard_bytes"`
	WriteZeroesBytes uint64 `json:"write_zeroes_bytes"`

	Errors   uint64 `json:"errors"`    // requests that ended with IOERR or UNSUPP
	InFlight uint64 `json:"in_flight"` // requests being handled right now
}

// Stats returns the counters.
func (d *Device) Stats() Stats { return Stats{} }
