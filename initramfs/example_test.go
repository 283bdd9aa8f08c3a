package initramfs_test

import (
	"fmt"

	"github.com/moovm/moovm/initramfs"
)

func ExampleArchive() {
	a := initramfs.Archive{
		Files: []initramfs.File{{Name: "/etc/motd", Data: []byte("hello\n")}},
	}
	b, err := a.Bytes()
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("%s, a multiple of 4 bytes: %v\n", b[:6], len(b)%4 == 0)
	// Output: 070701, a multiple of 4 bytes: true
}
