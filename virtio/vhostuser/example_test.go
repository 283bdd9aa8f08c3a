package vhostuser_test

import (
	"context"
	"log"

	"github.com/moovm/moovm/virtio/vhostuser"
	"github.com/moovm/moovm/virtioblk"
)

// A RAM disk for QEMU:
//
//	qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G,share=on -machine q35,memory-backend=m \
//	    -chardev socket,id=c,path=/run/disk.sock,reconnect=1 -device vhost-user-blk-pci,chardev=c …
func Example() {
	dev, err := virtioblk.New(virtioblk.Config{Backend: virtioblk.NewRAM(1 << 30), Queues: 4})
	if err != nil {
		log.Fatal(err)
	}
	l, err := vhostuser.Listen("/run/disk.sock")
	if err != nil {
		log.Fatal(err)
	}
	if err := vhostuser.Serve(context.Background(), l, dev, vhostuser.Options{}); err != nil {
		log.Fatal(err)
	}
}
