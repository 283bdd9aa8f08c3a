package oci

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Cache keeps root disks by the digest of their image, and layers of registries
// by theirs, so that images share them. Several processes may use one.
type Cache struct {
	Dir string
	// Log is told what was cleaned away; it may be nil.
	Log func(format string, args ...any)
}

// Root is a root disk.
type Root struct {
	Path    string    `json:"path"`
	Name    string    `json:"name"`   // the reference
	Digest  string    `json:"digest"` // the image's
	Size    int64     `json:"virtual-size"`
	Layers  int       `json:"layers"`
	Created time.Time `json:"created,omitzero"`
	Config  Config    `json:"config"`
	Cached  bool      `json:"cached"` // it was there already
}

// blobRest is how long a layer that nobody used stays.
const blobRest = 30 * 24 * time.Hour

// Pull makes the root disk of an image, or finds it: what the reference means
// now is asked in any case. The disk must not be changed; it is there until
// somebody removes it, since overlays may stand on it.
//
// Errors: those of Open and Image.Create.
func (c Cache) Pull(ctx context.Context, ref string, o Options, co CreateOptions) (*Root, error) {
	roots, blobs := filepath.Join(c.Dir, "roots"), filepath.Join(c.Dir, "layers")
	for _, dir := range []string{roots, blobs} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if o.TempDir == "" {
		o.TempDir = c.Dir
	}
	m, err := Open(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	path := filepath.Join(roots, fmt.Sprintf("%s-%d.img", cacheName(m.Digest), co.Size))
	r := &Root{Path: path, Name: ref, Digest: m.Digest, Layers: m.Layers(), Created: m.Created, Config: m.Config}
	st, err := os.Stat(path)
	if err == nil {
		r.Cached = true
	} else {
		c.prune(blobs)
		c.prune(roots)
		c.prune(c.Dir)
		co.Blobs = blobs
		if err := m.Create(ctx, path, co); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("%s: %w", ref, err)
		}
		if st, err = os.Stat(path); err != nil {
			return nil, err
		}
	}
	r.Size = st.Size()
	return r, c.remember(r, o, co)
}

// refPath is where the cache keeps what a reference meant.
func (c Cache) refPath(ref string, o Options, co CreateOptions) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%d", ref, o.Platform, co.Size))
	return filepath.Join(c.Dir, "refs", hex.EncodeToString(sum[:16])+".json")
}

func (c Cache) remember(r *Root, o Options, co CreateOptions) error {
	if _, _, local := Local(r.Name); local || r.Name == "-" {
		return nil // the file may be another one the next time
	}
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := c.refPath(r.Name, o, co)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "moovm-ref-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// Find is the root disk that the name of an image in a registry meant when it
// was pulled last; nil = it never was, or the disk is gone.
func (c Cache) Find(ref string, o Options, co CreateOptions) *Root {
	if _, _, local := Local(ref); local || ref == "-" {
		return nil
	}
	b, err := os.ReadFile(c.refPath(ref, o, co))
	if err != nil {
		return nil
	}
	r := &Root{}
	if json.Unmarshal(b, r) != nil || filepath.Dir(r.Path) != filepath.Join(c.Dir, "roots") {
		return nil
	}
	if st, err := os.Stat(r.Path); err != nil || st.Size() != r.Size {
		return nil
	}
	r.Cached = true
	return r
}

// prune removes layers that nobody used for long, and what interrupted pulls
// left behind.
func (c Cache) prune(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() {
			continue
		}
		age := time.Since(info.ModTime())
		left := strings.HasPrefix(e.Name(), "moovm-layer-") || strings.HasPrefix(e.Name(), ".moovm-root-") || strings.HasPrefix(e.Name(), "moovm-image-")
		old := filepath.Base(dir) == "layers" && age > blobRest
		if left && age > 24*time.Hour || old {
			if os.Remove(filepath.Join(dir, e.Name())) == nil && c.Log != nil {
				c.Log("removed %s from the cache", e.Name())
			}
		}
	}
}

// PullTo is Pull to a file of one's own, where nothing may be yet; layers are
// kept.
func (c Cache) PullTo(ctx context.Context, ref, path string, o Options, co CreateOptions) (*Root, error) {
	co.Blobs = filepath.Join(c.Dir, "layers")
	if err := os.MkdirAll(co.Blobs, 0o700); err != nil {
		return nil, err
	}
	if o.TempDir == "" {
		o.TempDir = c.Dir
	}
	m, err := Open(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	c.prune(co.Blobs)
	if err := m.Create(ctx, path, co); err != nil {
		return nil, fmt.Errorf("%s: %w", ref, err)
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	return &Root{Path: path, Name: ref, Digest: m.Digest, Size: st.Size(), Layers: m.Layers(), Created: m.Created, Config: m.Config}, nil
}
