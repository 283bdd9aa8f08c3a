package oci

// Limits bound what an image may be. Zero values are DefaultLimits'.
type Limits struct {
	// Bytes are those of all files of all layers, holes included, and those of
	// all layers unpacked.
	Bytes int64
	// Files are the entries of all layers.
	Files int
	// Metadata are the bytes of names, links and attributes, which are held in memory.
	Metadata int64
}

// DefaultLimits are generous: 64 GiB, two million files, 512 MiB.
func DefaultLimits() Limits { return Limits{Bytes: 64 << 30, Files: 2_000_000, Metadata: 512 << 20} }

func (l *Limits) setDefaults() {
	d := DefaultLimits()
	if l.Bytes == 0 {
		l.Bytes = d.Bytes
	}
	if l.Files == 0 {
		l.Files = d.Files
	}
	if l.Metadata == 0 {
		l.Metadata = d.Metadata
	}
}

const (
	maxName  = 4096 // as PATH_MAX
	maxDepth = 2048 // folders in each other
	maxLinks = 40   // symbolic links on one way, as Linux has it
)
