package cowdisk

import "context"

// Flatten writes the whole disk of the image at path to a new standalone file out: raw and sparse when v is VariantUnknown, else a COW
// image (QEMUV2 or UMLV3) without a backing file. out appears only when it is complete; an existing file is ErrExists.
func Flatten(ctx context.Context, path, out string, v Variant, o ToolOptions) error {
	o.ReadOnly = true
	src, err := OpenAny(path, o.Options)
	if err != nil {
		return err
	}
	defer src.Close()
	if err := sound(ctx, src.chain.layers, &o); err != nil {
		return err
	}
	fsys := o.fs()
	real, err := fsys.Resolve(out)
	if err != nil {
		return err
	}
	var h Header
	if v != VariantUnknown {
		co := CreateOptions{Size: src.size, Variant: v}
		if h, _, err = co.header(out, real, fsys); err != nil {
			return err
		}
	}
	f, err := fsys.Create(real)
	if err != nil {
		return renamed(err, real, out)
	}
	defer f.Close()
	l := &layer{path: out, real: real, file: f, size: src.size}
	if v != VariantUnknown {
		l, err = newImage(f, out, real, h, nil, o.BitmapMemory)
	} else {
		err = f.Truncate(src.size)
	}
	if err != nil {
		return err
	}
	dst := newDisk(out, []*layer{l}, false)
	p := &progress{ctx: ctx, f: o.Progress, total: src.size}
	err = src.Extents(ctx, 0, src.size, func(e Extent) error {
		if e.Zero {
			return p.add(e.Length)
		}
		return copyNonZero(src.chain, dst, e.Start, e.Length, p)
	})
	if err != nil {
		return err
	}
	dst.wrote()
	if err := dst.Flush(); err != nil {
		return err
	}
	if err := unchanged(src.chain.layers); err != nil {
		return err
	}
	return renamed(f.Publish(false, true), real, out)
}
