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
	if err := sound(ctx, d.chain.layers[:1], &o); err != nil {
		return err
	}
	h, err := d.resizedHeader(size)
	if err != nil {
		return err
	}
	switch old := d.chain.layers[0].hdr.Size; {
	case h.Size == old:
		return nil
	case h.Size < old && !shrink:
		return &Error{Path: path, Field: "size", Kind: ErrShrink, Detail: fmt.Sprintf("%d bytes to %d", d.size, size), Remedy: "if what lies beyond is not needed, use --shrink"}
	}
	l, err := d.resized(ctx, h, o)
	if err != nil {
		return err
	}
	return l.file.Close()
}

// resizedHeader is the image's header with another size.
func (d *Disk) resizedHeader(size int64) (Header, error) {
	old := d.chain.layers[0]
	h := old.hdr
	if err := checkSize(d.path, size); err != nil {
		return h, err
	}
	h.Size = size
	if h.Variant == QEMUV2 || h.Variant == QEMUV2i386 {
		h.Size = h.DiskSize()
	}
	if h.MTime == 0 || len(d.chain.layers) < 2 {
		return h, nil
	}
	return h, h.setBacking(d.path, old.real, h.Backing, d.chain.layers[1].asBacking(h.MTime))
}

// resized writes the image anew with header h and puts it in the place of the old one. Nobody can have come in between: the new file is
// locked before it has a name, and remains so until the layer's file is closed; the old one remains locked by d.
func (d *Disk) resized(ctx context.Context, h Header, o ToolOptions) (_ *layer, err error) {
	old := d.chain.layers[0]
	f, err := o.fs().Create(old.real)
	if err != nil {
		return nil, renamed(err, old.real, d.path)
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	l, err := newImage(f, d.path, old.real, h, old.raw, o.BitmapMemory)
	if err != nil {
		return nil, err
	}
	l.backer = old.backer
	nd := newDisk(d.path, append([]*layer{l}, d.chain.layers[1:]...), false)
	// The new limit must not show what the old one hid while units are copied up.
	for i := range nd.chain.limit[1:] {
		nd.chain.limit[i+1] = min(nd.chain.limit[i+1], d.chain.limit[i+1])
	}
	if err := commitData(ctx, old, nd, o); err != nil {
		return nil, err
	}
	nd.chain = newChain(nd.chain.layers)
	if l.size > old.size {
		if err := nd.WriteZeroes(old.size, l.size-old.size, true); err != nil {
			return nil, err
		}
	}
	if err := nd.Flush(); err != nil {
		return nil, err
	}
	return l, renamed(f.Publish(true, true), old.real, d.path)
}
