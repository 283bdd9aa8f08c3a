package oci

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/moovm/moovm/internal/ext4"
	"github.com/moovm/moovm/internal/unpack"
)

// unpacker puts layers upon each other in a file system.
type unpacker struct {
	w       *ext4.Writer
	left    Limits         // what may still come
	stream  int64          // bytes of layers, unpacked, that may still come
	visits  int            // of names by whiteouts, which may still come
	fresh   map[place]bool // names that this layer made
	hidden  map[place]bool // whiteouts of this layer that were followed
	implied ext4.Attr      // of folders that no entry tells about
}

// place is a name in a folder.
type place struct {
	dir  *ext4.Inode
	name string
}

func newUnpacker(w *ext4.Writer, l Limits, created time.Time) *unpacker {
	return &unpacker{w: w, left: l, stream: l.Bytes, visits: 100_000_000, implied: ext4.Attr{Mode: ext4.ModeDir | 0o755, MTime: created}}
}

// layer unpacks one; path is the entry that an error is about. stop makes
// reads from packed return, which may wait for a network.
func (u *unpacker) layer(ctx context.Context, packed io.Reader, stop func()) (path string, err error) {
	u.fresh, u.hidden = map[place]bool{}, map[place]bool{}
	plain, _, err := unpack.Stream(packed)
	if err != nil {
		return "", err
	}
	defer plain.Close()
	ahead := readAhead(&bounded{plain, &u.stream})
	defer func() {
		if err != nil {
			stop()
		}
		ahead.Close()
	}()
	r := tar.NewReader(ahead)
	for {
		if ctx.Err() != nil {
			return "", context.Cause(ctx)
		}
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return "", err
		}
		if u.left.Bytes -= h.Size; h.Size < 0 || u.left.Bytes < 0 {
			return h.Name, fmt.Errorf("%w: %d bytes", ErrTooLarge, h.Size)
		}
		if err := u.entry(h, r); err != nil {
			return h.Name, err
		}
	}
	// What follows has no meaning, but the digest is that of all.
	if _, err := io.Copy(io.Discard, ahead); err != nil {
		return "", err
	}
	_, err = io.Copy(io.Discard, packed)
	return "", err
}

// bounded ends with ErrTooLarge where more than left comes.
type bounded struct {
	r    io.Reader
	left *int64
}

func (b *bounded) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if *b.left -= int64(n); *b.left < 0 {
		return 0, ErrTooLarge
	}
	return n, err
}

// entry puts one entry of a layer into the file system.
func (u *unpacker) entry(h *tar.Header, contents io.Reader) error {
	if u.left.Files--; u.left.Files < 0 {
		return fmt.Errorf("%w: too many files", ErrTooLarge)
	}
	u.left.Metadata -= int64(len(h.Name) + len(h.Linkname))
	for name, value := range h.PAXRecords {
		u.left.Metadata -= int64(len(name) + len(value))
	}
	if u.left.Metadata < 0 {
		return fmt.Errorf("%w: too long names, links and attributes", ErrTooLarge)
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	parts, err := split(h.Name)
	if err != nil {
		return err
	}
	a, err := attr(h)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		if !isDir(a) {
			return fmt.Errorf("%w: the root is a folder", ErrEntry)
		}
		return u.w.SetAttr(u.w.Root(), a)
	}
	way, name := parts[:len(parts)-1], parts[len(parts)-1]
	for _, p := range way {
		if strings.HasPrefix(p, whiteout) && !strings.HasPrefix(p, whiteoutMeta) {
			return fmt.Errorf("%w: a folder with the name of a whiteout", ErrUnsafe)
		}
	}
	if rest, ok := strings.CutPrefix(name, whiteout); ok {
		return u.whiteout(way, rest)
	}
	for _, p := range way {
		if strings.HasPrefix(p, whiteoutMeta) {
			return nil // AUFS keeps its own things there
		}
	}
	dir, err := u.resolve(way, true)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeLink {
		return u.link(place{dir, name}, h.Linkname)
	}
	return u.put(place{dir, name}, a, h.Size, contents)
}

const (
	whiteout       = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..opq" // behind the first .wh.
)

// split takes a name apart.
func split(name string) ([]string, error) {
	if len(name) > maxName {
		return nil, fmt.Errorf("%w: %d bytes long", ErrUnsafe, len(name))
	}
	var parts []string
	for p := range strings.SplitSeq(name, "/") {
		switch {
		case p == "" || p == ".":
		case p == "..":
			return nil, fmt.Errorf("%w: .. is in it", ErrUnsafe)
		case len(p) > 255 || strings.IndexByte(p, 0) >= 0:
			return nil, fmt.Errorf("%w: no file can be called so", ErrUnsafe)
		default:
			parts = append(parts, p)
		}
	}
	return parts, nil
}

func isDir(a ext4.Attr) bool { return a.Mode&ext4.ModeType == ext4.ModeDir }

// attr is what an entry says about a file.
func attr(h *tar.Header) (a ext4.Attr, err error) {
	types := map[byte]uint32{
		tar.TypeReg: ext4.ModeFile, '\x00': ext4.ModeFile, tar.TypeCont: ext4.ModeFile, tar.TypeGNUSparse: ext4.ModeFile, tar.TypeLink: ext4.ModeFile,
		tar.TypeDir: ext4.ModeDir, tar.TypeSymlink: ext4.ModeSymlink, tar.TypeFifo: ext4.ModeFIFO, tar.TypeChar: ext4.ModeChar, tar.TypeBlock: ext4.ModeBlock,
	}
	t, ok := types[h.Typeflag]
	if !ok {
		return a, fmt.Errorf("%w: its type %q is not known", ErrEntry, h.Typeflag)
	}
	if h.Uid < 0 || h.Uid > math.MaxUint32 || h.Gid < 0 || h.Gid > math.MaxUint32 {
		return a, fmt.Errorf("%w: owner %d:%d", ErrEntry, h.Uid, h.Gid)
	}
	a = ext4.Attr{Mode: t | uint32(h.Mode)&0o7777, UID: uint32(h.Uid), GID: uint32(h.Gid), MTime: h.ModTime}
	switch t {
	case ext4.ModeSymlink:
		a.Target = h.Linkname
	case ext4.ModeChar, ext4.ModeBlock:
		if h.Devmajor < 0 || h.Devmajor > math.MaxUint32 || h.Devminor < 0 || h.Devminor > math.MaxUint32 {
			return a, fmt.Errorf("%w: device %d:%d", ErrEntry, h.Devmajor, h.Devminor)
		}
		a.Major, a.Minor = uint32(h.Devmajor), uint32(h.Devminor)
	}
	for name, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(name, "SCHILY.xattr.")
		if !ok || !knownXattr(name) {
			continue
		}
		if a.Xattrs == nil {
			a.Xattrs = map[string][]byte{}
		}
		a.Xattrs[name] = []byte(value)
	}
	return a, nil
}

// knownXattr leaves out what no file of Linux can have: other systems' tars
// have attributes of their own.
func knownXattr(name string) bool {
	for _, p := range []string{"user.", "trusted.", "security."} {
		if len(name) > len(p) && strings.HasPrefix(name, p) {
			return true
		}
	}
	return name == "system.posix_acl_access" || name == "system.posix_acl_default"
}

// put makes a file, in place of what is there.
func (u *unpacker) put(p place, a ext4.Attr, size int64, contents io.Reader) error {
	old := p.dir.Lookup(p.name)
	if old != nil {
		if isDir(a) && old.Dir() {
			u.fresh[p] = true
			return u.w.SetAttr(old, a)
		}
		if err := u.w.Unlink(p.dir, p.name); err != nil {
			return err
		}
	}
	n, err := u.w.Add(p.dir, p.name, a)
	if err != nil {
		return err
	}
	u.fresh[p] = true
	if a.Mode&ext4.ModeType != ext4.ModeFile || size == 0 {
		return nil
	}
	if err := u.w.Write(n, contents); err != nil {
		return err
	}
	if n.Size() != size {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// link gives one more name to a file of the image.
func (u *unpacker) link(p place, target string) error {
	parts, err := split(target)
	if err != nil {
		return fmt.Errorf("link to %.200q: %w", target, err)
	}
	if len(parts) == 0 {
		return fmt.Errorf("%w: a hard link to the root", ErrEntry)
	}
	dir, err := u.resolve(parts[:len(parts)-1], false)
	if err != nil {
		return err
	}
	var n *ext4.Inode
	if dir != nil {
		n = dir.Lookup(parts[len(parts)-1])
	}
	if n == nil || n.Dir() {
		return fmt.Errorf("%w: a hard link to %.200q, which is no file of this layer or one below", ErrEntry, target)
	}
	old := p.dir.Lookup(p.name)
	u.fresh[p] = true
	if old == n {
		return nil
	}
	if old != nil {
		if err := u.w.Unlink(p.dir, p.name); err != nil {
			return err
		}
		if n.Links() == 0 {
			return fmt.Errorf("%w: a hard link in place of the folder with its target", ErrEntry)
		}
	}
	return u.w.Link(p.dir, p.name, n)
}

// resolve finds a folder, as chroot into the image would: symbolic links lead
// nowhere else. What is missing is made, or nil is returned.
func (u *unpacker) resolve(parts []string, create bool) (*ext4.Inode, error) {
	way := []*ext4.Inode{u.w.Root()}
	links := 0
	for len(parts) > 0 {
		name := parts[0]
		parts = parts[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			way = way[:max(1, len(way)-1)]
			continue
		}
		dir := way[len(way)-1]
		n := dir.Lookup(name)
		switch {
		case n == nil && !create:
			return nil, nil
		case n == nil:
			var err error
			if u.left.Files--; u.left.Files < 0 {
				return nil, fmt.Errorf("%w: too many files", ErrTooLarge)
			}
			if n, err = u.w.Add(dir, name, u.implied); err != nil {
				return nil, err
			}
			u.fresh[place{dir, name}] = true
		case n.Mode&ext4.ModeType == ext4.ModeSymlink:
			if links++; links > maxLinks {
				return nil, fmt.Errorf("%w: more than %d symbolic links on the way", ErrUnsafe, maxLinks)
			}
			if strings.HasPrefix(n.Target, "/") {
				way = way[:1]
			}
			parts = append(strings.Split(n.Target, "/"), parts...)
			continue
		case !n.Dir():
			return nil, fmt.Errorf("%w: %.200q on the way is no folder", ErrEntry, name)
		}
		if way = append(way, n); len(way) > maxDepth {
			return nil, fmt.Errorf("%w: more than %d folders in each other", ErrUnsafe, maxDepth)
		}
	}
	return way[len(way)-1], nil
}

// whiteout hides what layers below have: one name, or all in a folder.
func (u *unpacker) whiteout(way []string, name string) error {
	opaque := name == whiteoutOpaque
	if !opaque && strings.HasPrefix(name, whiteout) {
		return nil // AUFS keeps its own things there
	}
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("%w: a whiteout of %q", ErrUnsafe, name)
	}
	dir, err := u.resolve(way, false)
	if dir == nil || err != nil {
		return err
	}
	if opaque {
		if u.hidden[place{dir, ""}] {
			return nil
		}
		u.hidden[place{dir, ""}] = true
		_, err := u.hideAll(dir)
		return err
	}
	p := place{dir, name}
	if u.hidden[p] {
		return nil
	}
	u.hidden[p] = true
	_, err = u.hide(p)
	return err
}

// hide takes a name away if it is of a layer below. A folder stays with what
// this layer put into it, and is this layer's then.
func (u *unpacker) hide(p place) (stays bool, err error) {
	n := p.dir.Lookup(p.name)
	if n == nil {
		return false, nil
	}
	if u.visits--; u.visits < 0 {
		return false, fmt.Errorf("%w: too much work for whiteouts", ErrTooLarge)
	}
	stays = u.fresh[p]
	if n.Dir() {
		kept, err := u.hideAll(n)
		if err != nil || stays {
			return stays, err
		}
		if kept {
			u.fresh[p] = true
			return true, u.w.SetAttr(n, u.implied)
		}
	}
	if !stays {
		err = u.w.Unlink(p.dir, p.name)
	}
	return stays, err
}

func (u *unpacker) hideAll(dir *ext4.Inode) (kept bool, err error) {
	for _, name := range dir.Names() {
		stays, err := u.hide(place{dir, name})
		if err != nil {
			return kept, err
		}
		kept = kept || stays
	}
	return kept, nil
}
