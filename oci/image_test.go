package oci_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/moovm/moovm/internal/ext4/ext4test"
	"github.com/moovm/moovm/oci"
	"github.com/moovm/moovm/oci/ocitest"
)

// create makes the root disk of an image and reads it back.
func create(t *testing.T, ref string, o oci.Options, co oci.CreateOptions) (path string, files map[string]*ext4test.File, err error) {
	t.Helper()
	m, err := oci.Open(t.Context(), ref, o)
	if err != nil {
		return "", nil, err
	}
	defer m.Close()
	path = filepath.Join(t.TempDir(), "root.img")
	if err := m.Create(t.Context(), path, co); err != nil {
		left, _ := os.ReadDir(filepath.Dir(path))
		if len(left) > 0 {
			t.Errorf("after %v there is still %v", err, left)
		}
		return "", nil, err
	}
	files, err = read(t, path)
	return path, files, err
}

func read(t testing.TB, path string) (map[string]*ext4test.File, error) {
	t.Helper()
	ext4test.Check(t, path)
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { f.Close() })
	return ext4test.Read(f)
}

// text is a file's contents.
func text(t testing.TB, files map[string]*ext4test.File, path string) string {
	t.Helper()
	f := files[path]
	if f == nil {
		return "(none)"
	}
	b, err := f.Contents()
	if err != nil {
		t.Errorf("%s: %v", path, err)
	}
	return string(b)
}

func someLayers(t testing.TB) [][]byte {
	xattr := ocitest.File("bin/ping", "program")
	xattr.Mode, xattr.Uid, xattr.Gid = 0o4755, 7, 100_000
	xattr.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00 \x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "SCHILY.xattr.com.apple.quarantine": "x"}
	null := ocitest.Entry{Header: tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3}}
	return [][]byte{
		ocitest.Tar(t, ocitest.Dir("etc"), ocitest.File("etc/old", "old"), ocitest.File("etc/kept", "kept"), ocitest.File("opaque/a", "a"), ocitest.File("opaque/b", "b"), null),
		ocitest.Tar(t, xattr, ocitest.Link("bin/ping6", "bin/ping"), ocitest.Symlink("lib", "usr/lib"), ocitest.Dir("usr/lib"), ocitest.File("lib/x.so", "x")),
		ocitest.Tar(t, ocitest.File("etc/.wh.old", ""), ocitest.File("opaque/c", "c"), ocitest.File("opaque/.wh..wh..opq", ""), ocitest.Link("etc/hard", "bin/ping")),
	}
}

func checkSome(t *testing.T, files map[string]*ext4test.File) {
	t.Helper()
	for path, want := range map[string]string{
		"/etc/old": "(none)", "/etc/kept": "kept", "/opaque/a": "(none)", "/opaque/c": "c", "/usr/lib/x.so": "x", "/bin/ping6": "program", "/etc/.wh.old": "(none)",
	} {
		if got := text(t, files, path); got != want {
			t.Errorf("%s: %q; want %q", path, got, want)
		}
	}
	p := files["/bin/ping"]
	if p == nil || p.Mode != 0o104755 || p.UID != 7 || p.GID != 100_000 || p.Links != 3 || len(p.Xattrs) != 1 || len(p.Xattrs["security.capability"]) != 20 || !p.MTime.Equal(ocitest.Time()) {
		t.Errorf("ping: %+v", p)
	}
	if f := files["/dev/null"]; f == nil || f.Mode != 0o020666 || f.Major != 1 || f.Minor != 3 {
		t.Errorf("null: %+v", f)
	}
	if f := files["/work"]; f == nil || f.Mode != 0o040755 {
		t.Errorf("the working folder: %+v", f)
	}
}

// TestSources has one image in all forms that images come in.
func TestSources(t *testing.T) {
	config := v1.Config{Entrypoint: []string{"/bin/ping"}, Cmd: []string{"-h"}, Env: []string{"A=b"}, User: "7", WorkingDir: "/work"}
	layers := someLayers(t)
	img := ocitest.Image(t, config, layers...)
	other := ocitest.Image(t, v1.Config{}, layers[0])
	folder := ocitest.Folder(t, img)
	packed, err := os.ReadFile(ocitest.Archive(t, folder))
	if err != nil {
		t.Fatal(err)
	}
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, _ = w.Write(packed)
	_ = w.Close()
	zipped := filepath.Join(t.TempDir(), "image.tar.gz")
	if err := os.WriteFile(zipped, z.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	ref := ocitest.Push(t, ocitest.Registry(t, nil), "some/image:v1", img)
	digest, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	repo, _ := strings.CutSuffix(ref, ":v1")
	saved := ocitest.Saved(t, img, layers...)
	var first []byte
	for _, c := range []struct {
		name, ref string
		stdin     io.Reader
		saved     bool
	}{
		{name: "folder", ref: folder},
		{name: "tarball", ref: ocitest.Archive(t, folder)},
		{name: "tarball.gz", ref: zipped},
		{name: "stdin", ref: "-", stdin: bytes.NewReader(packed)},
		{name: "stdin.gz", ref: "-", stdin: &z},
		{name: "one of two", ref: ocitest.Folder(t, other, img) + "#tag1"},
		{name: "registry", ref: ref},
		{name: "registry by digest", ref: repo + "@" + digest.String()},
		{name: "registry for sure", ref: "docker://" + ref},
		{name: "docker save", ref: ocitest.Archive(t, saved), saved: true},
		{name: "docker save, folder", ref: saved, saved: true},
		{name: "docker save, by name", ref: saved + "#image:latest", saved: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := oci.Options{Stdin: c.stdin, TempDir: t.TempDir()}
			m, err := oci.Open(t.Context(), c.ref, o)
			if err != nil {
				t.Fatal(err)
			}
			want := oci.Config{Entrypoint: config.Entrypoint, Cmd: config.Cmd, Env: config.Env, User: "7", WorkingDir: "/work"}
			if !reflect.DeepEqual(m.Config, want) || m.Layers() != 3 || m.Size() <= 0 || !m.Created.Equal(ocitest.Time()) {
				t.Errorf("%+v", m)
			}
			path := filepath.Join(t.TempDir(), "root.img")
			var told, total int64
			co := oci.CreateOptions{Size: 64 << 20, Progress: func(d, n int64) { told, total = d, n }}
			if err := m.Create(t.Context(), path, co); err != nil {
				t.Fatal(err)
			}
			if told != m.Size() || total != m.Size() {
				t.Errorf("%d of %d bytes told; want %d", told, total, m.Size())
			}
			if err := m.Close(); err != nil {
				t.Error(err)
			}
			if left, err := os.ReadDir(o.TempDir); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
			files, err := read(t, path)
			if err != nil {
				t.Fatal(err)
			}
			checkSome(t, files)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if first == nil {
				first = b
			}
			if equal := bytes.Equal(first, b); equal == c.saved { // without its manifest it has another digest
				t.Errorf("equal to the first: %v", equal)
			}
			if st, err := os.Stat(path); err != nil || !st.ModTime().Equal(ocitest.Time()) || st.Size() != 64<<20 {
				t.Errorf("%v, %v", st, err)
			}
			if err := m.Create(t.Context(), path, co); !errors.Is(err, os.ErrExist) {
				t.Errorf("on top of a file: %v", err)
			}
		})
	}
}

func TestNotFound(t *testing.T) {
	img := ocitest.Image(t, v1.Config{}, ocitest.Tar(t, ocitest.File("a", "a")))
	other := ocitest.Image(t, v1.Config{}, ocitest.Tar(t, ocitest.File("b", "b")))
	host := ocitest.Registry(t, nil)
	ref := ocitest.Push(t, host, "image:v1", img)
	foreign, err := mutate.ConfigFile(img, &v1.ConfigFile{OS: "linux", Architecture: "arm64", RootFS: v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{{Algorithm: "sha256", Hex: strings.Repeat("0", 64)}}}})
	if err != nil {
		t.Fatal(err)
	}
	empty := t.TempDir()
	text := filepath.Join(empty, "text")
	if err := os.WriteFile(text, bytes.Repeat([]byte("no image "), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	two := ocitest.Folder(t, img, other)
	for _, c := range []struct {
		ref, platform string
		want          error
		say           string
	}{
		{ref: host + "/image:v2", say: "no such image"},
		{ref: host + "/nothing", say: "no such image"},
		{ref: "Not A Name", want: oci.ErrReference},
		{ref: "./missing.tar", want: os.ErrNotExist},
		{ref: empty, want: oci.ErrNotImage},
		{ref: text, want: oci.ErrNotImage},
		{ref: two, want: oci.ErrAmbiguous, say: "tag0"},
		{ref: two + "#tag7", want: oci.ErrReference, say: "tag1"},
		{ref: ocitest.Folder(t, foreign), want: oci.ErrPlatform},
		{ref: ref, platform: "linux/arm64", want: oci.ErrPlatform},
		{ref: ref, platform: "x", want: oci.ErrReference},
		{ref: "-", want: oci.ErrReference},
	} {
		_, err := oci.Open(t.Context(), c.ref, oci.Options{Platform: c.platform})
		if err == nil || c.want != nil && !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.say) || !strings.Contains(err.Error(), c.ref) {
			t.Errorf("%s (%s): %v", c.ref, c.platform, err)
		}
	}
}

func TestPlatform(t *testing.T) {
	// An index of two images, one a platform.
	img := ocitest.Image(t, v1.Config{}, ocitest.Tar(t, ocitest.File("a", "amd64")))
	arm, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	arm = arm.DeepCopy()
	arm.Architecture = "arm64"
	img2, err := mutate.ConfigFile(img, arm)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		platform string
		img      v1.Image
	}{{"linux/amd64", img}, {"linux/arm64", img2}} {
		m, err := oci.Open(t.Context(), ocitest.PushIndex(t, ocitest.Registry(t, nil), "multi:v1", img, img2), oci.Options{Platform: c.platform})
		if err != nil {
			t.Fatal(err)
		}
		if want, err := c.img.Digest(); err != nil || m.Digest != want.String() {
			t.Errorf("%s: %s; want %s, %v", c.platform, m.Digest, want, err)
		}
	}
	if _, err := oci.Open(t.Context(), ocitest.PushIndex(t, ocitest.Registry(t, nil), "multi:v1", img, img2), oci.Options{Platform: "linux/s390x"}); !errors.Is(err, oci.ErrPlatform) {
		t.Error(err)
	}
}

// TestCredentials has a registry that wants to know who asks, and docker's file
// with the answer.
func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	t.Setenv("HOME", dir)
	img := ocitest.Image(t, v1.Config{}, ocitest.Tar(t, ocitest.File("a", "a")))
	open := true
	var mu sync.Mutex
	host := ocitest.Registry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			ok := open
			mu.Unlock()
			if name, password, _ := r.BasicAuth(); !ok && (name != "user" || password != "secret") {
				w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			h.ServeHTTP(w, r)
		})
	})
	ref := ocitest.Push(t, host, "image:v1", img)
	mu.Lock()
	open = false
	mu.Unlock()
	if _, _, err := create(t, ref, oci.Options{}, oci.CreateOptions{Size: 64 << 20}); err == nil || !strings.Contains(err.Error(), "docker login") {
		t.Errorf("without: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(`{"auths": {"`+host+`": {"auth": "dXNlcjpzZWNyZXQ="}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, files, err := create(t, ref, oci.Options{}, oci.CreateOptions{Size: 64 << 20}); err != nil || text(t, files, "/a") != "a" {
		t.Errorf("with: %v", err)
	}
}

func TestMirrors(t *testing.T) {
	img := ocitest.Image(t, v1.Config{}, ocitest.Tar(t, ocitest.File("a", "a")))
	mirror := ocitest.Registry(t, nil)
	ocitest.Push(t, mirror, "library/thing:v1", img)
	ocitest.Push(t, mirror, "proxied/library/thing:v1", img)
	empty := ocitest.Registry(t, nil)
	for _, mirrors := range [][]string{{mirror}, {empty, "http://" + mirror}, {mirror + "/proxied"}} {
		m, err := oci.Open(t.Context(), "thing:v1", oci.Options{Mirrors: map[string][]string{"docker.io": mirrors}})
		if err != nil {
			t.Fatal(err)
		}
		if want, err := img.Digest(); err != nil || m.Digest != want.String() {
			t.Errorf("%s, %v", m.Digest, err)
		}
	}
	// Where no mirror has it, the registry itself is asked.
	own := ocitest.Push(t, ocitest.Registry(t, nil), "own:v1", img)
	host, _, _ := strings.Cut(own, "/")
	if _, err := oci.Open(t.Context(), own, oci.Options{Mirrors: map[string][]string{host: {empty}}}); err != nil {
		t.Error(err)
	}
}

// TestLies has registries whose blobs are not what their manifest says.
func TestLies(t *testing.T) {
	layers := someLayers(t)
	img := ocitest.Image(t, v1.Config{}, layers...)
	all, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	second, err := all[1].Digest()
	if err != nil {
		t.Fatal(err)
	}
	for name, lie := range map[string]func([]byte) []byte{
		"other bytes":  func(b []byte) []byte { c := bytes.Clone(b); c[len(c)/2] ^= 1; return c },
		"another file": func(b []byte) []byte { return bytes.Clone(layers[0]) },
		"cut off":      func(b []byte) []byte { return b[:len(b)-20] },
		"nothing":      func(b []byte) []byte { return nil },
		"more":         func(b []byte) []byte { return append(bytes.Clone(b), "more"...) },
	} {
		t.Run(name, func(t *testing.T) {
			ref := ocitest.Push(t, ocitest.Registry(t, func(h http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, second.String()) {
						h.ServeHTTP(w, r)
						return
					}
					rc, err := all[1].Compressed()
					if err != nil {
						t.Error(err)
						return
					}
					b, err := io.ReadAll(rc)
					if err != nil {
						t.Error(err)
					}
					_, _ = w.Write(lie(b))
				})
			}), "image:v1", img)
			cache := oci.Cache{Dir: t.TempDir()}
			_, err := cache.Pull(t.Context(), ref, oci.Options{}, oci.CreateOptions{Size: 64 << 20})
			var layer *oci.LayerError
			if !errors.As(err, &layer) || layer.Index != 2 || layer.Count != 3 || layer.Digest != second.String() {
				t.Fatalf("%v", err)
			}
			if names, _ := filepath.Glob(filepath.Join(cache.Dir, "roots", "*")); len(names) > 0 {
				t.Errorf("left: %q", names)
			}
			names, _ := filepath.Glob(filepath.Join(cache.Dir, "layers", "*"))
			for _, n := range names {
				if strings.Contains(n, second.Hex) || strings.Contains(n, "moovm-layer-") {
					t.Errorf("kept: %s", n)
				}
			}
		})
	}
}

// TestStalled has a layer that is no good in front of one that never arrives,
// and in the middle of its own arrival: nobody waits for the rest.
func TestStalled(t *testing.T) {
	junk := bytes.Repeat([]byte("no tar at all. "), 100_000)
	good := ocitest.Tar(t, ocitest.File("a", "a"))
	img := ocitest.Image(t, v1.Config{}, junk, good)
	all, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, half := range []bool{false, true} {
		ref := ocitest.Push(t, ocitest.Registry(t, func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for i, l := range all {
					d, err := l.Digest()
					if err != nil {
						t.Error(err)
					}
					if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, d.String()) || i == 0 && !half {
						continue
					}
					if i == 0 {
						rc, err := l.Compressed()
						if err != nil {
							t.Error(err)
							return
						}
						_, _ = io.CopyN(w, rc, 4000)
					} else {
						w.WriteHeader(http.StatusOK)
					}
					_ = http.NewResponseController(w).Flush()
					<-r.Context().Done()
					return
				}
				h.ServeHTTP(w, r)
			})
		}), "image:v1", img)
		_, _, err := create(t, ref, oci.Options{Stall: time.Hour}, oci.CreateOptions{Size: 64 << 20})
		var layer *oci.LayerError
		if !errors.As(err, &layer) || layer.Index != 1 || errors.Is(err, oci.ErrStalled) {
			t.Errorf("%v", err)
		}
	}
}

// TestSilent has a registry that goes silent: the time for that is an option.
func TestSilent(t *testing.T) {
	img := ocitest.Image(t, v1.Config{}, ocitest.Tar(t, ocitest.File("a", "a")))
	for _, what := range []string{"/manifests/", "/blobs/"} {
		ref := ocitest.Push(t, ocitest.Registry(t, func(h http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodGet && strings.Contains(r.URL.Path, what) {
					<-r.Context().Done()
					return
				}
				h.ServeHTTP(w, r)
			})
		}), "image:v1", img)
		_, _, err := create(t, ref, oci.Options{Stall: 100 * time.Millisecond}, oci.CreateOptions{Size: 64 << 20})
		if !errors.Is(err, oci.ErrStalled) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestInterrupted(t *testing.T) {
	img := ocitest.Image(t, v1.Config{}, ocitest.Tar(t, ocitest.File("a", "a")))
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("interrupted")
	ref := ocitest.Push(t, ocitest.Registry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			d, err := img.Layers()
			if err != nil {
				t.Error(err)
				return
			}
			if h, err := d[0].Digest(); err == nil && r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, h.String()) {
				cancel(reason)
				<-r.Context().Done()
				return
			}
			h.ServeHTTP(w, r)
		})
	}), "image:v1", img)
	cache := oci.Cache{Dir: t.TempDir()}
	if _, err := cache.Pull(ctx, ref, oci.Options{}, oci.CreateOptions{Size: 64 << 20}); !errors.Is(err, reason) {
		t.Errorf("%v", err)
	}
	for _, dir := range []string{"roots", "layers", "."} {
		entries, err := os.ReadDir(filepath.Join(cache.Dir, dir))
		if err != nil {
			t.Error(err)
		}
		for _, e := range entries {
			if !e.IsDir() {
				t.Errorf("left: %s/%s", dir, e.Name())
			}
		}
	}
}

// TestCache counts what is fetched: nothing twice.
func TestCache(t *testing.T) {
	layers := someLayers(t)
	img := ocitest.Image(t, v1.Config{}, layers...)
	more := ocitest.Image(t, v1.Config{}, append(layers, ocitest.Tar(t, ocitest.File("more", "more")))...)
	var mu sync.Mutex
	fetched := 0
	host := ocitest.Registry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
				mu.Lock()
				fetched++
				mu.Unlock()
			}
			h.ServeHTTP(w, r)
		})
	})
	ref, ref2 := ocitest.Push(t, host, "image:v1", img), ocitest.Push(t, host, "other:v1", more)
	cache := oci.Cache{Dir: filepath.Join(t.TempDir(), "cache")}
	co := oci.CreateOptions{Size: 64 << 20}
	pull := func(ref string, co oci.CreateOptions, blobs int, cached bool) *oci.Root {
		t.Helper()
		mu.Lock()
		fetched = 0
		mu.Unlock()
		r, err := cache.Pull(t.Context(), ref, oci.Options{}, co)
		if err != nil {
			t.Fatal(err)
		}
		if r.Cached != cached || fetched != blobs {
			t.Errorf("%s: cached %v, %d blobs; want %v, %d", ref, r.Cached, fetched, cached, blobs)
		}
		return r
	}
	if r := cache.Find(ref, oci.Options{}, co); r != nil {
		t.Errorf("found before it was pulled: %+v", r)
	}
	first := pull(ref, co, 4, false) // three layers and the configuration
	again := pull(ref, co, 1, true)
	again.Cached = false
	if !reflect.DeepEqual(first, again) {
		t.Errorf("%+v; then %+v", first, again)
	}
	if r := cache.Find(ref, oci.Options{}, co); r == nil || r.Path != first.Path {
		t.Errorf("not found: %+v", r)
	}
	pull(ref, oci.CreateOptions{Size: 32 << 20}, 1, false)
	r := pull(ref2, co, 2, false)
	if files, err := read(t, r.Path); err != nil || text(t, files, "/more") != "more" || text(t, files, "/etc/kept") != "kept" {
		t.Error(err)
	}
	// A layer in the cache that is not what it was is found out, and fetched again.
	names, err := filepath.Glob(filepath.Join(cache.Dir, "layers", "sha256-*"))
	if err != nil || len(names) != 4 {
		t.Fatalf("%q, %v", names, err)
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)-1] ^= 0xff
		if err := os.WriteFile(n, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(first.Path); err != nil {
		t.Fatal(err)
	}
	if r := cache.Find(ref, oci.Options{}, co); r != nil {
		t.Errorf("found although it is gone: %+v", r)
	}
	for range names {
		if _, err = cache.Pull(t.Context(), ref, oci.Options{}, co); err == nil {
			break
		}
		var layer *oci.LayerError
		if !errors.As(err, &layer) {
			t.Fatal(err)
		}
	}
	if err != nil {
		t.Errorf("never mended: %v", err)
	}
}

func TestCommand(t *testing.T) {
	c := oci.Config{Entrypoint: []string{"e", "1"}, Cmd: []string{"c"}}
	for _, x := range []struct{ args, want []string }{{nil, []string{"e", "1", "c"}}, {[]string{"a", "b"}, []string{"e", "1", "a", "b"}}} {
		if got := c.Command(x.args); !reflect.DeepEqual(got, x.want) {
			t.Errorf("%q: %q", x.args, got)
		}
	}
}
