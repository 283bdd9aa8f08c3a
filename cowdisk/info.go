package cowdisk

import "io"

// Info is what `moovm info --json` shows, with the names of qemu-img where it has the same thing.
type Info struct {
	Filename            string    `json:"filename"`
	Format              string    `json:"format"` // cow or raw
	VirtualSize         int64     `json:"virtual-size"`
	ActualSize          int64     `json:"actual-size"`
	BackingFilename     string    `json:"backing-filename,omitempty"`
	FullBackingFilename string    `json:"full-backing-filename,omitempty"`
	FormatSpecific      *Specific `json:"format-specific,omitempty"` // nil for raw
}

// Specific is what only COW images have.
type Specific struct {
	Variant          Variant `json:"variant"`
	MTime            uint32  `json:"mtime"` // of the backing file, seconds; 0 = unknown
	SectorSize       int     `json:"sector-size"`
	AllocatedSectors int64   `json:"allocated-sectors"`
	BitmapOffset     int64   `json:"bitmap-offset"`
	DataOffset       int64   `json:"data-offset"`
}

// Layer is a read-only view of one layer of a disk and what lies below it. It is live, and of no use after the disk was closed.
type Layer struct {
	d *Disk
	c *chain
}

// Layers lists the chain: 0 is the image itself, the last one is the base.
func (d *Disk) Layers() []Layer {
	g, ok := d.gate.enter(0)
	if !ok {
		return nil
	}
	defer g.Add(-1)
	ls := make([]Layer, len(d.chain.layers))
	for i := range ls {
		ls[i] = Layer{d, newChain(d.chain.layers[i:])}
	}
	return ls
}

// top is the view of the whole disk.
func (d *Disk) top() Layer {
	if g, ok := d.gate.enter(0); ok {
		defer g.Add(-1)
	} // else the disk is closed, and the chain does not change any more
	return Layer{d, d.chain}
}

// do runs f unless the disk is closed.
func (l Layer) do(f func()) bool {
	if l.d == nil {
		return false
	}
	g, ok := l.d.gate.enter(0)
	if ok {
		f()
		g.Add(-1)
	}
	return ok
}

// Info describes the layer. Numbers that cannot be read are 0.
func (l Layer) Info() (i Info) {
	l.do(func() { i = l.c.layers[0].info() })
	return i
}

// Size is the layer's disk size in bytes.
func (l Layer) Size() int64 { return l.c.layers[0].size }

// Allocated is the number of sectors in this layer's file now; all of them for a raw file.
func (l Layer) Allocated() (n int64) {
	l.do(func() { n = l.c.layers[0].allocated() })
	return n
}

// HeaderBytes is a copy of the raw header; nil for a raw file.
func (l Layer) HeaderBytes() []byte { return append([]byte(nil), l.c.layers[0].raw...) }

// BitmapLen is the length of the bitmap in bytes; 0 for a raw file.
func (l Layer) BitmapLen() int64 {
	if b := l.c.layers[0].bm; b != nil {
		return b.bytes
	}
	return 0
}

// BitmapAt copies a piece of the live bitmap, as io.ReaderAt says: bit i%8 of byte i/8 = sector i is in this layer's file.
func (l Layer) BitmapAt(p []byte, off int64) (n int, err error) {
	b := l.c.layers[0].bm
	if b == nil {
		return 0, io.EOF
	}
	if !l.do(func() { n, err = b.readAt(p, off) }) {
		return 0, l.d.errClosed()
	}
	return n, err
}

// Info describes the image.
func (d *Disk) Info() Info { return d.top().Info() }

// Allocated is the number of sectors in the image's own file now.
func (d *Disk) Allocated() int64 { return d.top().Allocated() }

// HeaderBytes is a copy of the image's raw header.
func (d *Disk) HeaderBytes() []byte { return d.top().HeaderBytes() }

// BitmapLen is the length of the image's bitmap in bytes.
func (d *Disk) BitmapLen() int64 { return d.top().BitmapLen() }

// BitmapAt copies a piece of the live bitmap.
func (d *Disk) BitmapAt(p []byte, off int64) (int, error) { return d.top().BitmapAt(p, off) }

func (l *layer) allocated() int64 {
	if l.bm == nil {
		return (l.size + sectorSize - 1) / sectorSize
	}
	n, _ := l.bm.count(l.hdr.Sectors())
	return n
}

func (l *layer) info() Info {
	i := Info{Filename: l.path, Format: "raw", VirtualSize: roundUp(l.size, sectorSize)}
	if st, err := l.file.Stat(); err == nil {
		i.ActualSize = st.Allocated
	}
	if l.bm != nil {
		i.Format = "cow"
		if !standalone(l.hdr.Backing) {
			i.BackingFilename = l.hdr.Backing
		}
		i.FullBackingFilename = l.backer
		i.FormatSpecific = &Specific{Variant: l.hdr.Variant, MTime: l.hdr.MTime, SectorSize: l.hdr.SectorSize, AllocatedSectors: l.allocated(), BitmapOffset: l.hdr.BitmapOffset(), DataOffset: l.data}
	}
	return i
}
