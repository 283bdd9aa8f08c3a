package virtio9p_test

import (
	"fmt"
	"log"

	"github.com/hugelgupf/p9/fsimpl/staticfs"

	"github.com/moovm/moovm/virtio9p"
)

// A device for a machine's bus. The guest mounts it with
//
//	mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 notes /mnt
func Example() {
	tree, err := staticfs.New(staticfs.WithFile("hello", "Hello, guest.\n"))
	if err != nil {
		log.Fatal(err)
	}
	dev, err := virtio9p.New(virtio9p.Config{Tag: "notes", Attacher: tree})
	if err != nil {
		log.Fatal(err)
	}
	config := make([]byte, 7)
	dev.ReadConfig(0, config)
	fmt.Printf("device %d, queues %v, config %q\n", dev.ID(), dev.QueueSizes(), config)
	// Output: device 9, queues [128], config "\x05\x00notes"
}
