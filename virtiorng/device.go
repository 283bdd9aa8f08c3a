// Package virtiorng is the device half of a virtio entropy device (virtio 1.2,
// section 5.4).
package virtiorng

import (
	"crypto/rand"

	"github.com/moovm/moovm/virtio"
)

// Device fills the guest's buffers with random bytes of the host, so that a
// guest whose processor has no RDRAND does not wait for entropy. It keeps no
// state: the zero value is ready, for any number of machines.
type Device struct{}

const (
	deviceID  = 4
	queueSize = 8
	// maxRequest bounds the bytes of one request: a guest asks for tens of bytes,
	// and one that asks for gigabytes gets a part, as the device may do.
	maxRequest = 4096
)

var _ virtio.Device = Device{}

// ID implements virtio.Device.
func (Device) ID() uint32 { return deviceID }

// Features implements virtio.Device: there are none.
func (Device) Features() uint64 { return 0 }

// QueueSizes implements virtio.Device.
func (Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// ReadConfig implements virtio.Device: the space is empty.
func (Device) ReadConfig(_ uint32, p []byte) { clear(p) }

// WriteConfig implements virtio.Device.
func (Device) WriteConfig(uint32, []byte) {}

// Activate implements virtio.Device.
func (Device) Activate(uint64, virtio.ConfigNotifier) error { return nil }

// Reset implements virtio.Device.
func (Device) Reset() {}

// ServeQueue fills buffers until the queue stops.
func (Device) ServeQueue(_ int, q *virtio.Queue) error {
	var buf [maxRequest]byte
	for q.Wait() {
		for {
			c, err := q.Next()
			if err != nil {
				return err
			}
			if c == nil {
				break
			}
			w := c.Writer()
			b := buf[:min(uint64(w.Len()), maxRequest)]
			rand.Read(b) // never fails
			_, err = w.Write(b)
			q.Push(c)
			if err != nil {
				return err
			}
		}
		q.Notify()
	}
	return nil
}
