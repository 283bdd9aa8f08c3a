package cowdisk

import (
	"context"
	"errors"
	"fmt"
)

// ErrShrink: the new size is smaller, which throws data away.
var ErrShrink = errors.New("the new size is smaller than the disk")

// Resize changes the size of the disk in the image at path; a smaller one needs shrink. What is added reads as zeros even where the
// backing file is longer. The bitmap grows with the disk, so the data area moves: the image is written anew beside the old one, which it
// replaces when it is complete.
func Resize(ctx context.Context, path string, size int64, shrink bool, o ToolOptions) error {
	o.ReadOnly = false
	d, err := Open(path, o.Options)
	if err != nil {
		return err
	}
	defer d.Close()
	old := d.chain.layers[0]
	if err := checkSize(path, size); err != nil {
		return err
	}
	h := old.hdr
	h.Size = size
	if h.Variant == QEMUV2 || h.Variant == QEMUV2i386 {
		h.Size = h.DiskSize()
	}
	if h.Size == old.hdr.Size {
		return nil
	}
	if h.Size < old.hdr.Size && !shrink {
		return &Error{Path: path, Field: "size", Kind: ErrShrink, Detail: fmt.Sprintf("%d bytes to %d", d.size, size), Remedy: "if what lies beyond is not needed, use --shrink"}
	}
	if h.MTime != 0 && len(d.chain.layers) > 1 {
		base := d.chain.layers[1]
		i := backingInfo{size: base.size, mtime: h.MTime}
		if base.bm != nil {
			i.size = base.hdr.Size
		}
		if err := h.setBacking(path, old.real, h.Backing, i); err != nil {
			return err
		}
	}
	f, err := o.fs().Create(old.real)
	if err != nil {
		return renamed(err, old.real, path)
	}
	defer f.Close()
	l, err := newImage(f, path, old.real, h, old.raw, o.BitmapMemory)
	if err != nil {
		return err
	}
	nd := newDisk(path, append([]*layer{l}, d.chain.layers[1:]...), false)
	// The new limit must not show what the old one hid while units are copied up.
	for i := range nd.chain.limit[1:] {
		nd.chain.limit[i+1] = min(nd.chain.limit[i+1], d.chain.limit[i+1])
	}
	if err := commitData(ctx, old, nd, o); err != nil {
		return err
	}
	nd.chain = newChain(nd.chain.layers)
	if l.size > old.size {
		if err := nd.WriteZeroes(old.size, l.size-old.size, true); err != nil {
			return err
		}
	}
	if err := nd.Flush(); err != nil {
		return err
	}
	return renamed(f.Publish(true, true), old.real, path)
}
