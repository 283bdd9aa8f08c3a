package pci_test

import (
	"fmt"
	"log"

	"github.com/moovm/moovm/virtio/pci"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// What a machine does with a function: it places the BAR, and hands accesses
// of the guest on.
func Example() {
	dev, err := virtioblk.New(virtioblk.Config{Backend: virtioblk.NewRAM(1 << 20)})
	if err != nil {
		log.Fatal(err)
	}
	g := virtiotest.NewGuest(1 << 20)
	f, err := pci.New(dev, g.Memory, &virtiotest.PCIHost{}, pci.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer f.Close()
	bar := f.BARs()[0]
	f.WriteConfig(0x10, []byte{0, 0, 0, 0xe0}) // at 0xe0000000
	f.WriteConfig(0x04, []byte{2 | 4, 0})      // decode memory, be a bus master

	id := make([]byte, 4)
	f.ReadConfig(0, id)
	queues := make([]byte, 2)
	ours := f.ReadMem(0xe0000000+18, queues)
	fmt.Printf("%x, BAR %d is %d KiB, ours %v, %d queue\n", id, bar.Index, bar.Size>>10, ours, queues[0])
	// Output: f41a4210, BAR 0 is 32 KiB, ours true, 1 queue
}
