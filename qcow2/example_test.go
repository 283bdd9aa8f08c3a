package qcow2_test

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/moovm/moovm/qcow2"
)

// The disk inside an image is an io.ReaderAt: here it is written out as a raw image with holes where the image has none of it.
func Example() {
	img, err := qcow2.Open("cloud.qcow2", qcow2.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer img.Close()
	out, err := os.Create("cloud.img")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer out.Close()
	err = img.Extents(context.Background(), 0, img.Size(), func(e qcow2.Extent) error {
		if e.Kind != qcow2.Data {
			return nil
		}
		_, err := io.Copy(io.NewOffsetWriter(out, e.Start), io.NewSectionReader(img, e.Start, e.Length))
		return err
	})
	if err == nil {
		err = out.Truncate(img.Size())
	}
	fmt.Println(err)
	// Output: open cloud.qcow2: no such file or directory
}
