package oci

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/moovm/moovm/internal/unpack"
)

// blobs are the files of a tarball or folder with an image.
type blobs interface {
	open(name string) (io.ReadCloser, int64, error) // and how long it is
	io.Closer
}

// folder is a folder with an OCI layout, or with what docker save packs.
type folder struct{ root *os.Root }

func (f folder) open(name string) (io.ReadCloser, int64, error) {
	r, err := f.root.OpenFile(name, os.O_RDONLY|openNonblock, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := r.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: errors.New("not a file")}
	}
	if err != nil {
		r.Close()
		return nil, 0, err
	}
	return r, st.Size(), nil
}

func (f folder) Close() error { return f.root.Close() }

// tarball is a tar file that is not packed, whose entries are read where they
// lie.
type tarball struct {
	f      *os.File
	files  map[string]span
	remove bool // when it is closed
}

type span struct{ off, n int64 }

const maxTarballFiles = 100_000

func openTarball(f *os.File) (*tarball, error) {
	t := &tarball{f: f, files: map[string]span{}}
	links := map[string]string{}
	r := tar.NewReader(f) // which seeks over contents, and reads no further than the header
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotImage, err)
		}
		if len(t.files)+len(links) >= maxTarballFiles {
			return nil, fmt.Errorf("%w: more than %d files in the tarball", ErrTooLarge, maxTarballFiles)
		}
		name := path.Clean("/" + h.Name)[1:]
		switch h.Typeflag {
		case tar.TypeReg:
			off, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			t.files[name] = span{off, h.Size}
		case tar.TypeSymlink: // docker save links equal layers
			links[name] = path.Join("/", path.Dir(name), h.Linkname)[1:]
		case tar.TypeLink:
			links[name] = path.Clean("/" + h.Linkname)[1:]
		}
	}
	for name, target := range links {
		if s, ok := t.files[target]; ok {
			if _, there := t.files[name]; !there {
				t.files[name] = s
			}
		}
	}
	return t, nil
}

func (t *tarball) open(name string) (io.ReadCloser, int64, error) {
	s, ok := t.files[path.Clean("/" + name)[1:]]
	if !ok {
		return nil, 0, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return io.NopCloser(io.NewSectionReader(t.f, s.off, s.n)), s.n, nil
}

func (t *tarball) Close() error {
	err := t.f.Close()
	if t.remove {
		err = errors.Join(err, os.Remove(t.f.Name()))
	}
	return err
}

func openLocal(path, name string, o Options) (*Image, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	if st.IsDir() {
		f.Close()
		root, err := os.OpenRoot(path)
		if err != nil {
			return nil, err
		}
		return openBlobs(folder{root}, name, o)
	}
	if !st.Mode().IsRegular() {
		defer f.Close()
		return spool(f, name, o)
	}
	return openFile(f, name, o, false)
}

// openFile reads a tarball, which becomes the image's; one that is packed is
// unpacked first.
func openFile(f *os.File, name string, o Options, remove bool) (*Image, error) {
	head := make([]byte, 6)
	n, err := f.ReadAt(head, 0)
	if err == nil || err == io.EOF {
		if _, packed := unpack.Find(head[:n]); packed {
			m, err := spool(f, name, o)
			f.Close()
			if remove {
				os.Remove(f.Name())
			}
			return m, err
		}
		err = nil
	}
	var t *tarball
	if err == nil {
		t, err = openTarball(f)
	}
	if err != nil {
		f.Close()
		if remove {
			os.Remove(f.Name())
		}
		return nil, err
	}
	t.remove = remove
	return openBlobs(t, name, o)
}

func openStream(ctx context.Context, o Options) (*Image, error) {
	if o.Stdin == nil {
		return nil, fmt.Errorf("%w: there is no standard input", ErrReference)
	}
	// What waits for more of it ends with the context; the read itself cannot be woken.
	r, w := io.Pipe()
	defer r.Close()
	defer context.AfterFunc(ctx, func() { w.CloseWithError(context.Cause(ctx)) })()
	go func() {
		_, err := io.Copy(w, o.Stdin)
		w.CloseWithError(err)
	}()
	return spool(r, "", o)
}

// spool keeps a stream in a file, because layers come in any order there.
func spool(r io.Reader, name string, o Options) (_ *Image, err error) {
	in, _, err := unpack.Stream(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotImage, err)
	}
	defer in.Close()
	f, err := os.CreateTemp(o.TempDir, "moovm-image-*")
	if err != nil {
		return nil, err
	}
	n, err := io.Copy(f, io.LimitReader(in, DefaultLimits().Bytes+1))
	if err == nil && n > DefaultLimits().Bytes {
		err = fmt.Errorf("%w: more than %d bytes", ErrTooLarge, n-1)
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		f.Close()
		os.Remove(f.Name())
		return nil, err
	}
	t, err := openTarball(f)
	if err != nil {
		f.Close()
		os.Remove(f.Name())
		return nil, err
	}
	t.remove = true
	return openBlobs(t, name, o)
}

// openBlobs reads what kind of image is there. b becomes the image's.
func openBlobs(b blobs, name string, o Options) (*Image, error) {
	m, err := layoutImage(b, name, o)
	if errors.Is(err, fs.ErrNotExist) {
		m, err = savedImage(b, name, o)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: there is neither an index.json (OCI layout) nor a manifest.json (docker save) in it", ErrNotImage)
		}
	}
	if err != nil {
		b.Close()
		return nil, err
	}
	m.close = b.Close
	return m, nil
}

func readFile(b blobs, name string) ([]byte, error) {
	r, _, err := b.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return readSmall(r)
}

// blobName is where an OCI layout has what has the digest.
func blobName(digest string) (string, error) {
	if _, err := newHash(digest); err != nil {
		return "", err
	}
	return "blobs/" + strings.Replace(digest, ":", "/", 1), nil
}

func readBlob(b blobs, d v1.Descriptor) ([]byte, error) {
	name, err := blobName(d.Digest.String())
	if err != nil {
		return nil, err
	}
	raw, err := readFile(b, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s is missing", ErrNotImage, name)
	}
	if err == nil {
		err = checkBytes(raw, d.Digest.String(), d.Size)
	}
	return raw, err
}

// layoutImage finds an image in an OCI layout.
func layoutImage(b blobs, name string, o Options) (*Image, error) {
	raw, err := readFile(b, "index.json")
	if err != nil {
		return nil, err
	}
	platform, err := o.platform()
	if err != nil {
		return nil, err
	}
	d, err := pickManifest(b, raw, name, platform, 0)
	if err != nil {
		return nil, err
	}
	raw, err = readBlob(b, d)
	if err != nil {
		return nil, err
	}
	m := &Image{Digest: d.Digest.String()}
	manifest, err := parseManifest(raw)
	if err != nil {
		return nil, err
	}
	raw, err = readBlob(b, manifest.Config)
	if err != nil {
		return nil, err
	}
	c, err := m.setConfig(raw, len(manifest.Layers))
	if err != nil {
		return nil, err
	}
	if err := checkPlatform(c, platform); err != nil {
		return nil, err
	}
	for _, l := range manifest.Layers {
		name, err := blobName(l.Digest.String())
		if err != nil {
			return nil, err
		}
		m.layers = append(m.layers, localLayer(b, name, l.Digest.String(), l.Size))
	}
	return m, nil
}

// localLayer is a layer whose packed form has the digest.
func localLayer(b blobs, name, digest string, size int64) layer {
	return layer{digest: digest, size: size, open: func(context.Context) (io.ReadCloser, error) {
		r, _, err := b.open(name)
		if err != nil {
			return nil, err
		}
		v, err := verified(r, digest, size)
		if err != nil {
			r.Close()
			return nil, err
		}
		return readCloser{v, r}, nil
	}}
}

type readCloser struct {
	io.Reader
	io.Closer
}

func parseManifest(raw []byte) (*v1.Manifest, error) {
	manifest, err := v1.ParseManifest(bytes.NewReader(raw))
	if err != nil {
		return nil, fmt.Errorf("%w: its manifest: %w", ErrNotImage, err)
	}
	if !manifest.Config.MediaType.IsConfig() {
		return nil, fmt.Errorf("%w: it is something else, %.100q", ErrNotImage, manifest.Config.MediaType)
	}
	for _, l := range manifest.Layers {
		if strings.Contains(string(l.MediaType), "encrypted") {
			return nil, fmt.Errorf("%w: its layers are encrypted", ErrNotImage)
		}
	}
	return manifest, nil
}

// pickManifest is the manifest that is meant among those of an index: the one
// with the name if there is one, then the one for the platform.
func pickManifest(b blobs, raw []byte, name string, platform *v1.Platform, depth int) (none v1.Descriptor, err error) {
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return none, fmt.Errorf("%w: its index: %w", ErrNotImage, err)
	}
	if depth > 4 {
		return none, fmt.Errorf("%w: its indexes are in each other", ErrNotImage)
	}
	var found []v1.Descriptor
	var names []string
	for _, d := range index.Manifests {
		called := d.Annotations["org.opencontainers.image.ref.name"]
		full := d.Annotations["io.containerd.image.name"]
		if full != "" {
			names = append(names, full)
		} else if called != "" {
			names = append(names, called)
		}
		if name != "" && name != called && name != full {
			continue
		}
		if !d.MediaType.IsIndex() && !d.MediaType.IsImage() || d.Platform != nil && !d.Platform.Satisfies(*platform) {
			continue
		}
		found = append(found, d)
	}
	found = slices.CompactFunc(found, func(a, b v1.Descriptor) bool { return a.Digest == b.Digest })
	switch {
	case len(found) == 0 && name != "":
		return none, fmt.Errorf("%w: none is called %q; there are %.500q", ErrReference, name, names)
	case len(found) == 0:
		return none, fmt.Errorf("%w %s", ErrPlatform, platform)
	case len(found) > 1 && depth == 0:
		return none, fmt.Errorf("%w; add #NAME, of %.500q", ErrAmbiguous, names)
	}
	d := found[0] // in an index, the first one counts
	if !d.MediaType.IsIndex() {
		return d, nil
	}
	raw, err = readBlob(b, d)
	if err != nil {
		return none, err
	}
	return pickManifest(b, raw, "", platform, depth+1)
}

// savedImage finds an image in what docker save wrote before it knew the OCI
// layout. Its layers are not packed, and have the digests of the configuration.
func savedImage(b blobs, name string, o Options) (*Image, error) {
	raw, err := readFile(b, "manifest.json")
	if err != nil {
		return nil, err
	}
	var all []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("%w: its manifest.json: %w", ErrNotImage, err)
	}
	var names []string
	at := -1
	for i, m := range all {
		names = append(names, m.RepoTags...)
		if name == "" && len(all) == 1 || slices.Contains(m.RepoTags, name) {
			at = i
		}
	}
	switch {
	case at < 0 && name != "":
		return nil, fmt.Errorf("%w: none is called %q; there are %.500q", ErrReference, name, names)
	case at < 0:
		return nil, fmt.Errorf("%w; add #NAME, of %.500q", ErrAmbiguous, names)
	}
	saved := all[at]
	raw, err = readFile(b, saved.Config)
	if err != nil {
		return nil, missing(saved.Config, err)
	}
	sum := sha256.Sum256(raw)
	m := &Image{Digest: "sha256:" + hex.EncodeToString(sum[:])}
	if named := strings.TrimSuffix(path.Base(saved.Config), ".json"); len(named) == 64 && "sha256:"+named != m.Digest {
		return nil, fmt.Errorf("%w: the configuration %s", ErrDigest, saved.Config)
	}
	c, err := m.setConfig(raw, len(saved.Layers))
	if err != nil {
		return nil, err
	}
	platform, err := o.platform()
	if err != nil {
		return nil, err
	}
	if err := checkPlatform(c, platform); err != nil {
		return nil, err
	}
	for i, name := range saved.Layers {
		r, size, err := b.open(name)
		if err != nil {
			return nil, missing(name, err)
		}
		r.Close()
		m.layers = append(m.layers, savedLayer(b, name, c.RootFS.DiffIDs[i].String(), size))
	}
	return m, nil
}

func missing(name string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %.200q is missing", ErrNotImage, name) // and not fs.ErrNotExist, which would mean no manifest
	}
	return err
}

// savedLayer is a layer whose unpacked form has the digest.
func savedLayer(b blobs, name, diffID string, size int64) layer {
	return layer{digest: diffID, size: size, open: func(context.Context) (io.ReadCloser, error) {
		r, _, err := b.open(name)
		if err != nil {
			return nil, err
		}
		out, _, err := unpack.Stream(r)
		if err != nil {
			r.Close()
			return nil, err
		}
		v, err := verified(out, diffID, -1)
		if err != nil {
			r.Close()
			return nil, err
		}
		return readCloser{v, closers{out, r}}, nil
	}}
}

type closers []io.Closer

func (c closers) Close() (err error) {
	for _, x := range c {
		err = errors.Join(err, x.Close())
	}
	return err
}
