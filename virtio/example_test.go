package virtio_test

import (
	"fmt"
	"io"
	"log"
	"strings"

	"github.com/moovm/moovm/virtio"
	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
)

// shouter is a device with one queue that answers every request in capitals.
type shouter struct{}

func (shouter) ID() uint32                                   { return 63 }
func (shouter) Features() uint64                             { return 0 }
func (shouter) QueueSizes() []uint16                         { return []uint16{16} }
func (shouter) ReadConfig(uint32, []byte)                    {}
func (shouter) WriteConfig(uint32, []byte)                   {}
func (shouter) Activate(uint64, virtio.ConfigNotifier) error { return nil }
func (shouter) Reset()                                       {}

func (shouter) ServeQueue(_ int, q *virtio.Queue) error {
	for q.Wait() {
		for {
			c, err := q.Next()
			if err != nil {
				return err
			}
			if c == nil {
				break
			}
			text, _ := io.ReadAll(c.Reader())
			io.WriteString(c.Writer(), strings.ToUpper(string(text)))
			q.Push(c)
		}
		q.Notify()
	}
	return nil
}

// A device of one's own, plugged into a PCI function; virtiotest is the guest.
func Example() {
	g := virtiotest.NewGuest(1 << 20)
	t, err := virtiotest.NewPCI(shouter{}, g, pci.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer t.F.Close()
	d := virtiotest.Start(virtiotest.Must{}, t, g, virtiotest.RingFeatures, 16)

	in, b := g.Alloc(5, 1)
	copy(b, "hello")
	out, answer := g.Alloc(16, 1)
	n := d.Do(0, virtiotest.Buf{Addr: in, Len: 5}, virtiotest.Buf{Addr: out, Len: 16, Write: true})
	fmt.Println(string(answer[:n]))
	// Output: HELLO
}
