// Package ocitest makes container images for tests: layers of entries, and
// the forms in which images come.
package ocitest

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// Entry is one of a layer; Data are a file's contents.
type Entry struct {
	tar.Header
	Data string
}

// Time is that of entries and images that have no other.
func Time() time.Time { return time.Unix(1700000000, 0).UTC() }

// File is an entry for a plain file.
func File(name, data string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data}
}

// Dir is one for a folder.
func Dir(name string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}, ""}
}

// Symlink is one for a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, ""}
}

// Link is one for a hard link.
func Link(name, target string) Entry {
	return Entry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, ""}
}

// Tar packs a layer.
func Tar(t testing.TB, entries ...Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(e.Data))
		}
		if h.ModTime.IsZero() {
			h.ModTime = Time()
		}
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("%q: %v", h.Name, err)
		}
		if _, err := io.WriteString(w, e.Data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Image makes an image of layers, each of which Tar made.
func Image(t testing.TB, c v1.Config, layers ...[]byte) v1.Image {
	t.Helper()
	img := empty.Image
	for _, l := range layers {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(l)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			t.Fatal(err)
		}
	}
	f, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	f = f.DeepCopy()
	f.Config, f.OS, f.Architecture, f.Created = c, "linux", "amd64", v1.Time{Time: Time()}
	if img, err = mutate.ConfigFile(img, f); err != nil {
		t.Fatal(err)
	}
	return img
}

// Folder writes the image as an OCI layout, and returns its path.
func Folder(t testing.TB, images ...v1.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	for i, img := range images {
		if err := p.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "tag" + string(rune('0'+i))})); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Archive packs a folder, and returns the path.
func Archive(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := tar.NewWriter(f)
	if err := w.AddFS(os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// Saved writes what docker save wrote before it knew the OCI layout, as a
// folder.
func Saved(t testing.TB, img v1.Image, layers ...[]byte) string {
	t.Helper()
	dir := t.TempDir()
	raw, err := img.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(raw)
	config := hex.EncodeToString(sum[:]) + ".json"
	files := map[string][]byte{config: raw}
	var names []string
	for i, l := range layers {
		name := string(rune('a'+i)) + "/layer.tar"
		files[name] = l
		names = append(names, name)
	}
	if files["manifest.json"], err = json.Marshal([]map[string]any{{"Config": config, "RepoTags": []string{"image:latest"}, "Layers": names}}); err != nil {
		t.Fatal(err)
	}
	for name, b := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Registry is an empty registry on the loopback. around stands between it and
// its clients; nil = nothing does. It returns the host's name.
func Registry(t testing.TB, around func(http.Handler) http.Handler) string {
	t.Helper()
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	if around != nil {
		h = around(h)
	}
	s := httptest.NewServer(h)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return strings.TrimPrefix(s.URL, "http://")
}

// Push puts an image into a registry, and returns its reference.
func Push(t testing.TB, host, repo string, img v1.Image, o ...remote.Option) string {
	t.Helper()
	ref := host + "/" + repo
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, img, o...); err != nil {
		t.Fatal(err)
	}
	return ref
}

// PushIndex pushes images for several platforms, and returns the reference.
func PushIndex(t testing.TB, host, repo string, images ...v1.Image) string {
	t.Helper()
	var index v1.ImageIndex = empty.Index
	for _, img := range images {
		f, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: f.Platform()}})
	}
	ref := host + "/" + repo
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(r, index); err != nil {
		t.Fatal(err)
	}
	return ref
}
