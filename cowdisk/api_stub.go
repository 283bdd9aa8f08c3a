package cowdisk

import (
	"context"
	"errors"
	"io"
)

// Stage 1 skeleton: signatures are final, bodies follow.

type FS interface{}

type CreateOptions struct {
	Size                int64   // bytes; 0 = the backing file's
	Backing             string  // relative = relative to the image's folder; "" = none
	Variant             Variant // 0 = QEMUV2
	AllowMissingBacking bool
	FS                  FS
}

type Options struct {
	ReadOnly            bool
	NoLock              bool // read-only look at an image somebody else has open (info, map)
	AllowStaleBacking   bool
	AllowMissingBacking bool
	Backing             string   // use this instead of the path in the header; trusted
	BackingRoots        []string // folders (besides each image's own) below which backing paths may lie
	BitmapMemory        int64    // bytes; 0 = 64 MiB
	FS                  FS
}

type Header struct {
	Variant    Variant
	Backing    string
	MTime      uint32
	Size       int64
	SectorSize int
}

func Probe(r io.ReaderAt, size int64) (Header, error) { return Header{}, errors.ErrUnsupported }
func Create(path string, o CreateOptions) error       { return errors.ErrUnsupported }
func Open(path string, o Options) (*Disk, error)      { return nil, errors.ErrUnsupported }
func OpenRaw(path string, o Options) (*Disk, error)   { return nil, errors.ErrUnsupported } // a plain file or block device as a disk

type Disk struct{}

func (d *Disk) ReadAt(p []byte, off int64) (int, error)        { return 0, errors.ErrUnsupported }
func (d *Disk) WriteAt(p []byte, off int64) (int, error)       { return 0, errors.ErrUnsupported }
func (d *Disk) ReadvAt(bufs [][]byte, off int64) (int, error)  { return 0, errors.ErrUnsupported }
func (d *Disk) WritevAt(bufs [][]byte, off int64) (int, error) { return 0, errors.ErrUnsupported }
func (d *Disk) Flush() error                                   { return errors.ErrUnsupported }
func (d *Disk) Discard(off, n int64) error                     { return errors.ErrUnsupported }
func (d *Disk) WriteZeroes(off, n int64, mayUnmap bool) error  { return errors.ErrUnsupported }
func (d *Disk) Size() int64                                    { return 0 }
func (d *Disk) ReadOnly() bool                                 { return false }
func (d *Disk) Close() error                                   { return nil }
func (d *Disk) Info() Info                                     { return Info{} }
func (d *Disk) Allocated() int64                               { return 0 }
func (d *Disk) HeaderBytes() []byte                            { return nil }
func (d *Disk) BitmapLen() int64                               { return 0 }
func (d *Disk) BitmapAt(p []byte, off int64) (int, error)      { return 0, io.EOF }
func (d *Disk) Extents(ctx context.Context, off, n int64, yield func(Extent) error) error {
	return errors.ErrUnsupported
}
func (d *Disk) Layers() []Layer { return nil }
func (d *Disk) Stats() Stats    { return Stats{} }

// Layer: the same read-only view for one layer (with what lies below it).
type Layer struct{}

func (l Layer) Info() Info                                { return Info{} }
func (l Layer) Size() int64                               { return 0 }
func (l Layer) Allocated() int64                          { return 0 }
func (l Layer) HeaderBytes() []byte                       { return nil }
func (l Layer) BitmapLen() int64                          { return 0 }
func (l Layer) BitmapAt(p []byte, off int64) (int, error) { return 0, io.EOF }
func (l Layer) Extents(ctx context.Context, off, n int64, yield func(Extent) error) error {
	return errors.ErrUnsupported
}

type Stats struct{ CopyUps, Syncs uint64 }

type Extent struct {
	Start    int64  `json:"start"`
	Length   int64  `json:"length"`
	Depth    int    `json:"depth"`
	Present  bool   `json:"present"`
	Zero     bool   `json:"zero"`
	Data     bool   `json:"data"`
	Offset   *int64 `json:"offset,omitempty"`
	Filename string `json:"filename,omitempty"`
}

type Info struct {
	Filename            string    `json:"filename"`
	Format              string    `json:"format"` // cow, raw
	VirtualSize         int64     `json:"virtual-size"`
	ActualSize          int64     `json:"actual-size"`
	BackingFilename     string    `json:"backing-filename,omitempty"`
	FullBackingFilename string    `json:"full-backing-filename,omitempty"`
	FormatSpecific      *Specific `json:"format-specific,omitempty"`
}

type Specific struct {
	Variant          Variant `json:"variant"`
	MTime            uint32  `json:"mtime"`
	SectorSize       int     `json:"sector-size"`
	AllocatedSectors int64   `json:"allocated-sectors"`
	BitmapOffset     int64   `json:"bitmap-offset"`
	DataOffset       int64   `json:"data-offset"`
}
