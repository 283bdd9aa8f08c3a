package cowdisk

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
)

// CreateOptions say what to create.
type CreateOptions struct {
	// Size of the disk in bytes; 0 = the backing file's.
	Size int64
	// Backing is the backing file, raw or COW; a relative path starts at the image's folder. "" = none, the disk reads as zeros.
	Backing string
	// BackingFormat says what Backing is, which the image remembers. FormatUnknown looks at its first bytes, and refuses (ErrFormat) what
	// begins like a COW image: see "Raw or COW" in the package's documentation.
	BackingFormat Format
	// BackingRoots and AllowStaleBacking are used to open Backing, as Options has them: what cannot be opened is found before anything is made.
	BackingRoots      []string
	AllowStaleBacking bool
	// Variant is QEMUV2 (the default) or UMLV3.
	Variant Variant
	// AllowMissingBacking makes an overlay for a file that is not there; Size must be given.
	AllowMissingBacking bool
	// FS makes the file; nil = HostFS.
	FS FS
	// Log is told that a change of the backing file will go unnoticed, as its time is 0; nil = nobody is.
	Log *slog.Logger
}

// Create makes an image in which nothing is allocated. It appears under its name only when it is complete; an existing file is never
// touched (ErrExists). It is not synced: the first Flush of the disk does that.
// Errors: ErrExists, ErrSize, ErrVariant, ErrPathTooLong, and of the backing file those of Open.
func Create(path string, o CreateOptions) error {
	fsys := o.FS
	if fsys == nil {
		fsys = HostFS{}
	}
	real, err := fsys.Resolve(path)
	if err != nil {
		return err
	}
	h, base, err := o.header(path, real, fsys)
	defer base.close()
	if err != nil {
		return err
	}
	warnUnknownTime(o.Log, append([]*layer{{path: path, hdr: h}}, base.chain...))
	f, err := fsys.Create(real)
	if err != nil {
		return renamed(err, real, path)
	}
	defer f.Close()
	if _, err := newImage(f, path, real, h, nil, 0); err != nil {
		return err
	}
	return renamed(f.Publish(false, false), real, path)
}

// header validates the options. The backing file stays locked until base is closed: what the header says of it must be true when the image
// appears.
func (o *CreateOptions) header(path, real string, fsys FS) (h Header, base backingInfo, err error) {
	h = Header{Variant: o.Variant, Size: o.Size, SectorSize: sectorSize}
	switch h.Variant {
	case VariantUnknown:
		h.Variant = QEMUV2
	case QEMUV2:
	case UMLV3:
	default:
		return h, base, &Error{Path: path, Field: "layout", Kind: ErrVariant, Detail: h.Variant.String(), Remedy: "create v2 or v3"}
	}
	if h.Variant == UMLV3 {
		h.Alignment = defaultAlign
	}
	if o.Backing != "" {
		if base, err = inspectBacking(o.backing(fsys), &layer{path: path, real: real}, o.Backing, o.BackingFormat); err != nil {
			if !o.AllowMissingBacking || o.Size == 0 || !errors.Is(err, ErrBackingMissing) {
				return h, base, err
			}
		}
		if h.Size == 0 {
			h.Size = base.size
		}
	}
	if err := checkSize(path, h.Size); err != nil {
		return h, base, err
	}
	if h.Variant == QEMUV2 {
		h.Size = h.DiskSize() // QEMU would cut the tail off
	}
	return h, base, h.setBacking(path, real, o.Backing, base)
}

// backing are the options that the backing file is opened with.
func (o *CreateOptions) backing(fsys FS) Options {
	return Options{FS: fsys, BackingRoots: o.BackingRoots, AllowStaleBacking: o.AllowStaleBacking, AllowMissingBacking: o.AllowMissingBacking}
}

func checkSize(path string, size int64) error {
	if size < sectorSize || size > maxDiskSize {
		return &Error{Path: path, Field: "size", Kind: ErrSize, Detail: fmt.Sprintf("%d bytes", size), Remedy: "a disk has at least one sector of 512 bytes and at most 8 PiB"}
	}
	return nil
}

// setBacking makes the header name a backing file and remember its time and size.
func (h *Header) setBacking(path, real, backing string, base backingInfo) error {
	h.Backing, h.MTime, h.BackingSize, h.HasBackingSize = storedPath(real, backing, base.real), base.mtime, 0, false
	h.BackingFormat = FormatUnknown
	if backing != "" {
		h.BackingFormat = base.format
	}
	if layouts[h.Variant].version == 3 {
		switch {
		case backing == "":
			h.Backing = standaloneV3
		case !filepath.IsAbs(backing):
			if h.Backing = base.real; h.Backing == "" {
				h.Backing = backingPath(real, backing)
			}
		}
	}
	exact := layouts[h.Variant].uml
	if base.mtime != 0 && (exact && base.size != h.Size || !exact && roundUp(base.size, sectorSize) < h.DiskSize()) {
		h.BackingSize, h.HasBackingSize = base.size, true
	}
	if strings.IndexByte(h.Backing, 0) >= 0 {
		return &Error{Path: path, Field: "backing file", Kind: ErrBackingMissing, Detail: fmt.Sprintf("%q", backing), Remedy: "a path cannot contain a NUL byte"}
	}
	if n := h.maxPath(); len(h.Backing) > n {
		return &Error{Path: path, Field: "backing file", Kind: ErrPathTooLong, Detail: fmt.Sprintf("%d bytes, at most %d", len(h.Backing), n), Remedy: "use a shorter, for example relative, path"}
	}
	return nil
}

// storedPath is what the header of the image at real says for a backing file that the caller named: his words, unless they go up from
// something that may be a symlink. Other programs, and people, take that by its text, so then it is what was opened. So it is when the file
// is in the image's folder but named by way of a symlink elsewhere: who opens the image later does not look there.
func storedPath(real, backing, opened string) string {
	down := strings.TrimLeft(backing, "./")
	up := strings.Contains("/"+down+"/", "/../")
	if filepath.IsAbs(backing) {
		_, is := inside(filepath.Dir(real), opened)
		_, looks := inside(filepath.Dir(real), backing)
		up = up || is && !looks
	}
	if !up || opened == "" {
		return backing
	}
	if rel, err := filepath.Rel(filepath.Dir(real), opened); err == nil && !filepath.IsAbs(backing) {
		return rel
	}
	return opened
}

// backingInfo is what a header keeps of a backing file.
type backingInfo struct {
	size   int64 // of the disk in it
	mtime  uint32
	real   string
	format Format
	chain  []*layer // locked against writers; nil = there is none
}

// close gives the locks back.
func (i *backingInfo) close() { closeLayers(i.chain) }

// inspectBacking opens the backing file that the caller named for the image top, and all that lies below, as the image will: what could
// not be opened then is found before anything is made or changed. Of top only path, real and id need be known. The caller closes what it
// returns, also with an error.
func inspectBacking(o Options, top *layer, backing string, format Format) (i backingInfo, err error) {
	at := backingPath(top.real, backing)
	r, err := o.fs().Resolve(at)
	if err == nil && r == top.real {
		return i, &Error{Path: top.path, Field: "backing file", Kind: ErrBackingLoop, Detail: backing + " is the image itself", Remedy: "name another backing file"}
	}
	i.real, i.format = r, format
	o.ReadOnly, o.NoLock, o.Backing, o.BackingFormat = true, false, "", FormatUnknown
	op := opener{o: o, layers: []*layer{{path: top.path, real: top.real, id: top.id, named: true}}}
	defer func() { i.chain = op.layers[1:] }()
	var f File
	if err == nil {
		f, err = o.fs().Open(r, OpenMode{})
	}
	if errors.Is(err, fs.ErrNotExist) {
		remedy := "check the path"
		if !filepath.IsAbs(backing) {
			remedy = "a relative path starts at the folder of the image"
		}
		return i, &Error{Path: top.path, Field: "backing file", Kind: ErrBackingMissing, Detail: at, Err: fs.ErrNotExist, Remedy: remedy}
	}
	if err == nil {
		err = op.add(at, r, f, format, true)
	}
	if err != nil {
		return i, fmt.Errorf("%s: backing file: %w", top.path, renamed(err, r, at))
	}
	base := op.layers[1]
	if base.id == top.id && top.id != (FileID{}) {
		return i, loopError(top, at)
	}
	st, err := base.file.Stat()
	if err != nil {
		return i, err
	}
	return base.asBacking(st.mtime32()), nil
}
