package virtionet_test

import (
	"fmt"
	"log"
	"net"

	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtionet"
)

// printer is a Link that prints what the guest sends and answers it.
type printer struct{ r virtionet.Receiver }

func (p *printer) Attach(r virtionet.Receiver) error {
	p.r = r
	r.SetLink(true)
	return nil
}

func (p *printer) Send(packet []byte) {
	fmt.Printf("the guest sent a frame of %d bytes\n", len(packet)-virtionet.HeaderSize)
	p.r.Receive(packet)
}

func (*printer) Offloads() virtionet.Offloads { return virtionet.Offloads{} }
func (*printer) Close() error                 { return nil }

// A network device with a link of one's own, behind a window of MMIO
// registers; virtiotest is the guest.
func Example() {
	dev, err := virtionet.New(virtionet.Config{
		Link: &printer{},
		MAC:  net.HardwareAddr{0x02, 0, 0, 0, 0, 0x01},
	})
	if err != nil {
		log.Fatal(err)
	}
	g := virtiotest.NewGuest(1 << 20)
	t, err := virtiotest.NewMMIO(dev, g, mmio.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer t.Close()

	n := virtiotest.NewNet(virtiotest.Start(virtiotest.Must{}, t, g, virtiotest.NetFeatures, 16))
	n.Transmit(1, virtiotest.Packet(60, 0))
	n.Post(2048)
	packet, _ := n.Receive()
	fmt.Printf("and received one of %d\n", len(packet)-virtionet.HeaderSize)
	// Output:
	// the guest sent a frame of 60 bytes
	// and received one of 60
}
