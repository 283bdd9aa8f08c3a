package sharefs_test

import (
	"fmt"
	"log"
	"os"

	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/virtio9p"
)

// A folder of the host for the guest to read and write.
func Example() {
	dir, err := os.MkdirTemp("", "share")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	share, err := sharefs.New(dir, sharefs.Options{Writable: true})
	if err != nil {
		log.Fatal(err)
	}
	defer share.Close()
	dev, err := virtio9p.New(virtio9p.Config{Tag: "work", Attacher: share})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("virtio device", dev.ID())
	// Output: virtio device 9
}
