package cowdisk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"time"
)

// Options say how to open an image.
type Options struct {
	// ReadOnly refuses writes and locks the image against writers only.
	ReadOnly bool
	// NoLock, with ReadOnly, looks at an image that another program has open for writing. What it shows may be out of date.
	NoLock bool
	// AllowStaleBacking opens an overlay although its backing file changed after it was made. The disk is probably corrupt.
	AllowStaleBacking bool
	// AllowMissingBacking opens an overlay without its backing file; what lies there reads as zeros.
	AllowMissingBacking bool
	// AllowDamage opens an image that lost its end (ErrDamaged), and lets tools work with one in which Check finds damage. What is missing
	// reads as zeros, as it does with ReadOnly and NoLock.
	AllowDamage bool
	// Format of the image, for OpenAny and the tools that take raw disks too. FormatUnknown is looked up in the file's first bytes, which
	// a guest may have written: what begins like a COW image is then refused (ErrFormat).
	Format Format
	// Backing is used in place of the path in the image's header. It is trusted: BackingRoots do not restrict it.
	Backing string
	// BackingFormat of the image's backing file is used in place of what the header says.
	BackingFormat Format
	// BackingRoots are folders below which the paths in headers may lead, besides the folder of the image that names them.
	BackingRoots []string
	// BitmapMemory bounds the memory for bitmap pages, in bytes a layer; 0 = 64 MiB.
	BitmapMemory int64
	// FS opens the files; nil = HostFS.
	FS FS
	// Log is told of an overlay that does not say when its backing file was last changed; nil = nobody is.
	Log *slog.Logger
}

// maxChain bounds the layers of a chain.
const maxChain = 128

func (o *Options) fs() FS {
	if o.FS == nil {
		return HostFS{}
	}
	return o.FS
}

func (o *Options) mode(top bool) OpenMode {
	return OpenMode{Write: top && !o.ReadOnly, NoLock: o.NoLock && o.ReadOnly}
}

// Open opens a COW image and its backing files. The image is locked against every other program (with ReadOnly: against writers), the
// backing files against writers.
//
// Errors (errors.Is): ErrNotCOW, ErrVersion, ErrTruncated, ErrHeader, ErrSize, ErrAmbiguous, ErrVariant, ErrIsDirectory, ErrLocked,
// ErrReadOnly, ErrFormat, ErrForeign, ErrBackingMissing, ErrBackingOutside, ErrStaleBacking, ErrBackingLoop, ErrChainTooLong, ErrDamaged and
// those of the file system.
func Open(path string, o Options) (*Disk, error) {
	return openDisk(path, o, FormatCOW)
}

// Inspect opens a COW image to look at it, read-only and without a lock, and its chain as far as it can be opened. What keeps the rest from
// being opened, or makes it the wrong one, is trouble, an error as Open gives it; nil = nothing does. What lies in files that could not be
// opened reads as zeros. err: the image itself cannot be read.
func Inspect(path string, o Options) (d *Disk, trouble, err error) {
	o.ReadOnly, o.NoLock = true, true
	op := opener{o: o, lenient: true}
	if err := op.open(path, FormatCOW); err != nil {
		closeLayers(op.layers)
		return nil, nil, err
	}
	d = newDisk(path, op.layers, true)
	d.fs, d.memory = o.fs(), o.BitmapMemory
	return d, op.trouble, nil
}

// OpenRaw opens a plain file or block device as a disk without a header.
func OpenRaw(path string, o Options) (*Disk, error) {
	return openDisk(path, o, FormatRaw)
}

// OpenAny opens what Options.Format says; without it, as a raw disk, what begins like neither a COW image nor anything else that is known.
// Errors also: ErrFormat, ErrForeign.
func OpenAny(path string, o Options) (*Disk, error) {
	return openDisk(path, o, o.Format)
}

func openDisk(path string, o Options, format Format) (_ *Disk, err error) {
	op := opener{o: o}
	defer func() {
		if err != nil {
			closeLayers(op.layers)
		}
	}()
	if err := op.open(path, format); err != nil {
		return nil, err
	}
	if !o.AllowDamage && !(o.ReadOnly && o.NoLock) {
		for _, l := range op.layers {
			if err := l.intact(context.Background()); err != nil {
				return nil, err
			}
		}
	}
	warnUnknownTime(o.Log, op.layers)
	d := newDisk(path, op.layers, o.ReadOnly)
	d.fs, d.memory = o.fs(), o.BitmapMemory
	return d, nil
}

func newDisk(path string, layers []*layer, readOnly bool) *Disk {
	layers[0].write = !readOnly
	return &Disk{path: path, readOnly: readOnly, size: layers[0].size, chain: newChain(layers)}
}

// renamed makes an error about the resolved path speak of the path the caller gave.
func renamed(err error, real, path string) error {
	var e *Error
	var pe *fs.PathError
	switch {
	case errors.As(err, &e) && e.Path == real:
		e.Path = path
	case errors.As(err, &pe) && pe.Path == real:
		pe.Path = path
	}
	return err
}

// opener builds a chain from the top down. Its files are closed by whoever owns it when something fails.
type opener struct {
	o         Options
	layers    []*layer
	topOnly   bool // leave the backing file alone
	writeBase bool // the layer below the top is opened for writing, too (commit)
	lenient   bool // what is wrong below the top, or with its length, becomes trouble
	trouble   error
}

// open opens the image at path as the top of the chain.
func (op *opener) open(path string, format Format) error {
	real, err := op.o.fs().Resolve(path)
	if err != nil {
		return err
	}
	f, err := op.o.fs().Open(real, op.o.mode(true))
	if err != nil {
		return renamed(err, real, path)
	}
	return op.add(path, real, f, format, true)
}

// add makes f, which it owns from here on, the next layer, and goes on to its backing file. A file of unknown format is raw unless
// it begins like something else, which is refused; named: with what the user can say about it.
func (op *opener) add(path, real string, f File, format Format, named bool) error {
	n := len(op.layers)
	l := &layer{path: path, real: real, file: f, named: named}
	op.layers = append(op.layers, l)
	if err := op.makeLayer(l, format, named); err != nil {
		if op.lenient && n > 0 {
			closeLayers(op.layers[n:])
			op.layers = op.layers[:n]
		}
		return err
	}
	if l.bm == nil {
		return nil
	}
	err := op.addBacking(l)
	if op.lenient && err != nil {
		if op.trouble == nil {
			op.trouble = err
		}
		return nil
	}
	return err
}

// makeLayer finds out what is in the file of l, the last layer.
func (op *opener) makeLayer(l *layer, format Format, named bool) error {
	path, f := l.path, l.file
	st, err := f.Stat()
	if err != nil {
		return err
	}
	l.id, l.seen = st.ID, st
	if format == FormatUnknown {
		if format, err = detect(f, path, st.Size); err != nil {
			return err
		}
		switch {
		case format == FormatCOW && named:
			return unnamedError(path)
		case format == FormatCOW:
			return unmarkedError(op.layers[len(op.layers)-2].path, path)
		}
	}
	if format == FormatRaw {
		l.size = st.Size
		if len(op.layers) == 1 {
			l.size = roundUp(st.Size, sectorSize) // the tail is not lost; a write to it makes the file longer
		}
		return nil
	}
	h, b, err := op.probe(l, st.Size)
	if err != nil {
		return err
	}
	if layouts[h.Variant].readOnly && len(op.layers) == 1 && !op.o.ReadOnly {
		return &Error{Path: path, Field: "layout", Kind: ErrVariant, Detail: h.Variant.String() + " is read-only", Remedy: "open it read-only, or flatten it to a v2 or v3 image"}
	}
	err = l.image(h, b, st.Size, op.o.BitmapMemory)
	if op.lenient && len(op.layers) == 1 && errors.Is(err, ErrTruncated) {
		op.trouble = err
		l.bm = newBitmap(l.file, l.path, &l.hdr, op.o.BitmapMemory) // what is missing reads as zeros
		return nil
	}
	return err
}

// standalone reports whether a header names no backing file.
func standalone(backing string) bool { return backing == "" || backing == standaloneV3 }

func (op *opener) addBacking(l *layer) error {
	top := len(op.layers) == 1
	if op.topOnly {
		return nil
	}
	if standalone(l.hdr.Backing) && !(top && op.o.Backing != "") {
		return nil
	}
	if len(op.layers) == maxChain {
		return &Error{Path: l.path, Field: "backing file", Kind: ErrChainTooLong, Detail: fmt.Sprintf("%d layers", maxChain), Remedy: "commit or flatten some of them"}
	}
	f, path, real, err := op.openBacking(l, top)
	l.backer = path
	if real != "" {
		l.backer = real
	}
	if err != nil {
		if op.o.AllowMissingBacking && errors.Is(err, ErrBackingMissing) {
			return nil
		}
		return err
	}
	st, err := f.Stat()
	if err == nil {
		for _, u := range op.layers {
			if u.id == st.ID && st.ID != (FileID{}) {
				err = loopError(l, path)
			}
		}
	}
	if err != nil {
		f.Close()
		return err
	}
	n := len(op.layers)
	format, named := l.hdr.BackingFormat, false
	if top && op.o.Backing != "" {
		named = true
	}
	if top && op.o.BackingFormat != FormatUnknown {
		format = op.o.BackingFormat
	}
	if err := op.add(path, real, f, format, named); err != nil {
		return err
	}
	if op.o.AllowStaleBacking {
		return nil
	}
	return stale(l, op.layers[n], st.mtime32())
}

func loopError(l *layer, path string) error {
	return &Error{Path: l.path, Field: "backing file", Kind: ErrBackingLoop, Detail: path + " is above it in the chain", Remedy: "give it another backing file with rebase -u"}
}

// backingPath is where a header's path leads: relative paths start at the image's folder.
func backingPath(image, backing string) string { return follow(image, backing) }

// follow is where the path to leads that was read in the file (or symlink) from. It is not cleaned: only the kernel knows what the
// parent of something is.
func follow(from, to string) string {
	if filepath.IsAbs(to) {
		return to
	}
	return strings.TrimSuffix(filepath.Dir(from), "/") + "/" + to
}

func (op *opener) openBacking(l *layer, top bool) (f File, path, real string, err error) {
	fsys := op.o.fs()
	trusted := top && op.o.Backing != ""
	if trusted {
		path = op.o.Backing
	} else {
		path = backingPath(l.real, l.hdr.Backing)
	}
	missing := func(err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return &Error{Path: l.path, Field: "backing file", Kind: ErrBackingMissing, Detail: path, Err: fs.ErrNotExist, Remedy: "put it back, or name its new place with rebase -u -b"}
		}
		return fmt.Errorf("%s: backing file: %w", l.path, err)
	}
	var root, rel string
	if trusted {
		real, err = fsys.Resolve(path)
	} else {
		real, root, rel, err = op.walker(l).walk(path)
	}
	switch {
	case errors.Is(err, ErrBackingOutside):
		return nil, path, "", outsideError(l, path, err)
	case err != nil:
		return nil, path, "", missing(err)
	}
	for _, u := range op.layers {
		if u.real == real {
			return nil, path, real, loopError(l, path)
		}
	}
	m := op.o.mode(false)
	m.Write = op.writeBase && top
	if trusted {
		if f, err = fsys.Open(real, m); err != nil {
			return nil, path, real, missing(err)
		}
		return f, path, real, nil
	}
	if f, err = fsys.OpenBeneath(root, rel, m); err != nil {
		if errors.Is(err, ErrLocked) && op.isAbove(root, rel) {
			return nil, path, real, loopError(l, path)
		}
		return nil, path, real, missing(err)
	}
	return f, path, real, nil
}

// isAbove: a file that cannot be locked may be one we have locked ourselves under another name.
func (op *opener) isAbove(root, rel string) bool {
	f, err := op.o.fs().OpenBeneath(root, rel, OpenMode{NoLock: true})
	if err != nil {
		return false
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return false
	}
	for _, u := range op.layers {
		if u.id == st.ID && st.ID != (FileID{}) {
			return true
		}
	}
	return false
}

// stale compares the backing file with what the header says about it. A header with mtime 0 says nothing.
func stale(l, base *layer, mtime uint32) error {
	h := &l.hdr
	if h.MTime == 0 {
		return nil
	}
	detail := ""
	size := base.size
	if base.bm != nil {
		size = base.hdr.Size
	}
	switch {
	case mtime != h.MTime:
		detail = fmt.Sprintf("%s was modified at %s, the overlay was made for %s", base.path, clock(mtime), clock(h.MTime))
	case h.HasBackingSize && size != h.BackingSize:
		detail = fmt.Sprintf("%s has %d bytes, had %d", base.path, size, h.BackingSize)
	case !h.HasBackingSize && (roundUp(size, sectorSize) < h.DiskSize() || layouts[h.Variant].uml && size != h.Size):
		detail = fmt.Sprintf("%s has %d bytes, had %d", base.path, size, h.Size)
	default:
		return nil
	}
	return &Error{Path: l.path, Field: "backing file", Kind: ErrStaleBacking, Detail: detail, Remedy: "what the guest sees would be corrupt; if you know that the contents are right, accept them with rebase -u"}
}

func clock(t uint32) string { return time.Unix(int64(t), 0).UTC().Format(time.DateTime) }
