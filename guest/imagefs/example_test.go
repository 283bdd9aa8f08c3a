package imagefs_test

import (
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/hugelgupf/p9/p9"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/guest/imagefs"
	"github.com/moovm/moovm/virtio9p"
)

// A 9P device that shows a machine its disk.
func Example() {
	dir, err := os.MkdirTemp("", "imagefs")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "root.cow")
	if err := cowdisk.Create(path, cowdisk.CreateOptions{Size: 1 << 20}); err != nil {
		log.Fatal(err)
	}
	disk, err := cowdisk.Open(path, cowdisk.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()

	tree, err := imagefs.New("1.0", imagefs.Disk{Name: "vda", Image: imagefs.COW(disk)})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := virtio9p.New(virtio9p.Config{Tag: "moovm", Attacher: tree}); err != nil {
		log.Fatal(err)
	}

	// What `cat /run/moovm/disks/vda/allocated` shows, before and after a write.
	cat := func() {
		root, err := tree.Attach()
		if err != nil {
			log.Fatal(err)
		}
		_, f, err := root.Walk([]string{"disks", "vda", "allocated"})
		if err != nil {
			log.Fatal(err)
		}
		defer f.Close()
		if _, _, err := f.Open(p9.ReadOnly); err != nil {
			log.Fatal(err)
		}
		b, err := io.ReadAll(io.NewSectionReader(f, 0, 1000))
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%s", b)
	}
	cat()
	if _, err := disk.WriteAt([]byte("hello"), 0); err != nil {
		log.Fatal(err)
	}
	cat()
	// Output:
	// 0
	// 8
}
