package virtioblk_test

import (
	"fmt"
	"log"

	"github.com/moovm/moovm/virtio/mmio"
	"github.com/moovm/moovm/virtio/virtiotest"
	"github.com/moovm/moovm/virtioblk"
)

// A block device on a RAM disk, behind a window of MMIO registers; virtiotest
// is the guest.
func Example() {
	disk := virtioblk.NewRAM(1 << 20)
	dev, err := virtioblk.New(virtioblk.Config{Backend: disk, Serial: "example"})
	if err != nil {
		log.Fatal(err)
	}
	g := virtiotest.NewGuest(4 << 20)
	t, err := virtiotest.NewMMIO(dev, g, mmio.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer t.Close()

	b := virtiotest.NewBlock(virtiotest.Start(virtiotest.Must{}, t, g, virtiotest.BlockFeatures, 16))
	sector := make([]byte, 512)
	copy(sector, "written by the guest")
	b.Request(0, virtiotest.BlkOut, 7, sector, nil)

	p := make([]byte, 20)
	disk.ReadAt(p, 7*512)
	fmt.Printf("%s, %d write\n", p, dev.Stats().Writes)
	// Output: written by the guest, 1 write
}
