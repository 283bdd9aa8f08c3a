package cowdisk_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/moovm/moovm/cowdisk"
)

// A disk on top of a file that stays as it is.
func Example() {
	dir, err := os.MkdirTemp("", "cowdisk-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	base := filepath.Join(dir, "base.img")
	if err := os.WriteFile(base, make([]byte, 1<<20), 0o644); err != nil {
		log.Fatal(err)
	}
	image := filepath.Join(dir, "root.cow")
	if err := cowdisk.Create(image, cowdisk.CreateOptions{Backing: "base.img"}); err != nil {
		log.Fatal(err)
	}
	disk, err := cowdisk.Open(image, cowdisk.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	if _, err := disk.WriteAt([]byte("hello"), 5000); err != nil {
		log.Fatal(err)
	}
	if err := disk.Flush(); err != nil { // from here on it is safe
		log.Fatal(err)
	}
	fmt.Println("sectors in the overlay:", disk.Allocated())
	err = disk.Extents(context.Background(), 0, disk.Size(), func(e cowdisk.Extent) error {
		fmt.Printf("%7d + %7d from %s\n", e.Start, e.Length, filepath.Base(e.Filename))
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	// Output:
	// sectors in the overlay: 8
	//       0 +    4096 from base.img
	//    4096 +    4096 from root.cow
	//    8192 + 1040384 from base.img
}

// Merge an overlay into its base.
func ExampleCommit() {
	dir, err := os.MkdirTemp("", "cowdisk-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	base, image := filepath.Join(dir, "base.img"), filepath.Join(dir, "root.cow")
	if err := os.WriteFile(base, make([]byte, 8192), 0o644); err != nil {
		log.Fatal(err)
	}
	if err := cowdisk.Create(image, cowdisk.CreateOptions{Backing: "base.img"}); err != nil {
		log.Fatal(err)
	}
	disk, err := cowdisk.Open(image, cowdisk.Options{})
	if err != nil {
		log.Fatal(err)
	}
	if _, err := disk.WriteAt([]byte("merged"), 0); err != nil {
		log.Fatal(err)
	}
	if err := disk.Close(); err != nil {
		log.Fatal(err)
	}
	if err := cowdisk.Commit(context.Background(), image, cowdisk.ToolOptions{}); err != nil {
		log.Fatal(err)
	}
	b, err := os.ReadFile(base)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", b[:6])
	// Output: merged
}
