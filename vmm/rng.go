package vmm

import (
	"crypto/rand"

	"github.com/moovm/moovm/virtio"
)

// rng is a virtio entropy device (virtio 1.2, section 5.4): it fills the
// guest's buffers with random bytes of the host, so that a guest whose
// processor has no RDRAND does not wait for entropy.
type rng struct{}

const (
	idEntropy = 4
	rngQueue  = 8
	// rngMax bounds the bytes of one request: a guest asks for tens of bytes,
	// and one that asks for gigabytes gets a part, as the device may do.
	rngMax = 4096
)

var _ virtio.Device = rng{}

func (rng) ID() uint32                                   { return idEntropy }
func (rng) Features() uint64                             { return 0 }
func (rng) QueueSizes() []uint16                         { return []uint16{rngQueue} }
func (rng) ReadConfig(_ uint32, p []byte)                { clear(p) }
func (rng) WriteConfig(uint32, []byte)                   {}
func (rng) Activate(uint64, virtio.ConfigNotifier) error { return nil }
func (rng) Reset()                                       {}

// ServeQueue fills buffers until the queue stops.
func (rng) ServeQueue(_ int, q *virtio.Queue) error {
	var buf [rngMax]byte
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
			b := buf[:min(uint64(w.Len()), rngMax)]
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
