package pci

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"github.com/moovm/moovm/virtio"
)

// Offsets in the common configuration structure (section 4.1.4.3).
const (
	comDeviceFeatureSelect = 0
	comDeviceFeature       = 4
	comDriverFeatureSelect = 8
	comDriverFeature       = 12
	comConfigVector        = 16
	comNumQueues           = 18
	comStatus              = 20
	comGeneration          = 21
	comQueueSelect         = 22
	comQueueSize           = 24
	comQueueVector         = 26
	comQueueEnable         = 28
	comQueueNotifyOff      = 30
	comQueueDesc           = 32
	comQueueDriver         = 40
	comQueueDevice         = 48
	comQueueNotifyData     = 56
	comQueueReset          = 58
	commonLen              = 60
)

const noVector = 0xffff

// commonConfig are the registers the transport keeps itself.
type commonConfig struct {
	mu            sync.Mutex
	deviceFeature uint32 // selectors
	driverFeature uint32
	queueSelect   uint16

	config atomic.Uint32 // vectors; read by interrupting goroutines
	queue  []atomic.Uint32
}

func (c *commonConfig) init(queues int) {
	c.queue = make([]atomic.Uint32, queues)
	c.reset()
}

func (c *commonConfig) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deviceFeature, c.driverFeature, c.queueSelect = 0, 0, 0
	c.config.Store(noVector)
	for i := range c.queue {
		c.queue[i].Store(noVector)
	}
}

func (c *commonConfig) configVector() uint16     { return uint16(c.config.Load()) }
func (c *commonConfig) queueVector(i int) uint16 { return uint16(c.queue[i].Load()) }

func (c *commonConfig) selectors() (device, driver uint32, queue int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.deviceFeature, c.driverFeature, int(c.queueSelect)
}

// readCommon composes the whole structure and copies what was asked for: no
// register changes by being read, and any width works.
func (f *Function) readCommon(off uint64, p []byte) {
	if off >= commonLen {
		return
	}
	var b [commonLen]byte
	le := binary.LittleEndian
	dev, drv, qi := f.common.selectors()
	le.PutUint32(b[comDeviceFeatureSelect:], dev)
	le.PutUint32(b[comDeviceFeature:], f.core.DeviceFeatures(dev))
	le.PutUint32(b[comDriverFeatureSelect:], drv)
	le.PutUint32(b[comDriverFeature:], f.core.DriverFeatures(drv))
	le.PutUint16(b[comConfigVector:], f.common.configVector())
	le.PutUint16(b[comNumQueues:], uint16(f.core.NumQueues()))
	b[comStatus] = f.core.Status()
	b[comGeneration] = byte(f.core.ConfigGeneration())
	le.PutUint16(b[comQueueSelect:], uint16(qi))
	le.PutUint16(b[comQueueVector:], noVector)
	if qi < f.core.NumQueues() {
		q := f.core.Queue(qi)
		le.PutUint16(b[comQueueSize:], q.Size)
		le.PutUint16(b[comQueueVector:], f.common.queueVector(qi))
		if q.Ready {
			b[comQueueEnable] = 1
		}
		le.PutUint16(b[comQueueNotifyOff:], uint16(qi))
		le.PutUint64(b[comQueueDesc:], q.Desc)
		le.PutUint64(b[comQueueDriver:], q.Driver)
		le.PutUint64(b[comQueueDevice:], q.Device)
		le.PutUint16(b[comQueueNotifyData:], uint16(qi))
		if f.core.QueueResetting(qi) {
			b[comQueueReset] = 1
		}
	}
	copy(p, b[off:])
}

// writeCommon writes one register. The driver must use the register's own
// width, or 32-bit halves for 64-bit ones (section 4.1.3.1); other accesses
// are ignored.
func (f *Function) writeCommon(off uint64, p []byte) {
	le := binary.LittleEndian
	c := &f.common
	if len(p) == 8 && (off == comQueueDesc || off == comQueueDriver || off == comQueueDevice) {
		f.writeCommon(off, p[:4])
		f.writeCommon(off+4, p[4:])
		return
	}
	_, drv, qi := c.selectors()
	switch {
	case len(p) == 1 && off == comStatus:
		f.core.SetStatus(p[0])
	case len(p) == 2:
		v := le.Uint16(p)
		switch off {
		case comConfigVector:
			c.config.Store(f.vector(v))
		case comQueueSelect:
			c.mu.Lock()
			c.queueSelect = v
			c.mu.Unlock()
		case comQueueSize:
			f.core.ConfigureQueue(qi, func(q *virtio.QueueConfig) { q.Size = v })
		case comQueueVector:
			if qi < len(c.queue) {
				c.queue[qi].Store(f.vector(v))
			}
		case comQueueEnable:
			if v == 1 {
				f.core.EnableQueue(qi)
			}
		case comQueueReset:
			if v == 1 {
				f.core.ResetQueue(qi)
				if qi < len(c.queue) && !f.core.Queue(qi).Ready {
					c.queue[qi].Store(noVector)
				}
			}
		}
	case len(p) == 4:
		v := le.Uint32(p)
		switch off {
		case comDeviceFeatureSelect:
			c.mu.Lock()
			c.deviceFeature = v
			c.mu.Unlock()
		case comDriverFeatureSelect:
			c.mu.Lock()
			c.driverFeature = v
			c.mu.Unlock()
		case comDriverFeature:
			f.core.SetDriverFeatures(drv, v)
		case comQueueDesc, comQueueDesc + 4, comQueueDriver, comQueueDriver + 4, comQueueDevice, comQueueDevice + 4:
			f.core.ConfigureQueue(qi, func(q *virtio.QueueConfig) {
				a := [...]*uint64{&q.Desc, &q.Driver, &q.Device}[(off-comQueueDesc)/8]
				shift := off % 8 * 8
				*a = *a&^(0xffffffff<<shift) | uint64(v)<<shift
			})
		}
	}
}

// vector is what a vector register holds after v was written: v if there is
// such a vector, else NO_VECTOR (section 4.1.5.1.2.1).
func (f *Function) vector(v uint16) uint32 {
	if int(v) < len(f.msix.vectors) {
		return uint32(v)
	}
	return noVector
}
