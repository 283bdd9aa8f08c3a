package mmio_test

import (
	"fmt"
	"log"

	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// lamp is a machine's interrupt line.
type lamp struct{}

func (lamp) SetInterrupt(level bool) { fmt.Println("interrupt", level) }

// What a machine does with a device: it hands accesses to its window on.
func Example() {
	dev, err := virtioblk.New(virtioblk.Config{Backend: virtioblk.NewRAM(1 << 20)})
	if err != nil {
		log.Fatal(err)
	}
	d, err := mmio.New(dev, virtiotest.NewGuest(1<<20).Memory, lamp{}, mmio.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	p := make([]byte, 4)
	d.Read(0, p)
	fmt.Printf("%s\n", p)
	// Output: virt
}
