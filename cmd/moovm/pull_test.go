package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/moovm/moovm/internal/ext4/ext4test"
	"github.com/moovm/moovm/oci"
	"github.com/moovm/moovm/oci/ocitest"
)

// runPull is `moovm pull ARG…` in this process.
func runPull(t *testing.T, ctx context.Context, args ...string) (stdout string, status int, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	root := newRootCommand()
	root.SetArgs(append([]string{"pull"}, args...))
	root.SetOut(&out)
	root.SetErr(&errs)
	err = root.ExecuteContext(ctx)
	var se *statusError
	switch {
	case errors.As(err, &se):
		status = se.status
	case err != nil:
		status = exitFailed
	}
	return out.String(), status, err
}

func TestPull(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("MOOVM_CACHE", cache)
	img := ocitest.Image(t, v1.Config{Entrypoint: []string{"/bin/e"}, Cmd: []string{"c"}, User: "u"}, ocitest.Tar(t, ocitest.File("f", "data")))
	ref := ocitest.Push(t, ocitest.Registry(t, nil), "image:v1", img)
	out, status, err := runPull(t, t.Context(), "--json", "-s", "64M", ref)
	if status != 0 {
		t.Fatal(err)
	}
	var r oci.Root
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if digest, err := img.Digest(); err != nil || r.Digest != digest.String() || r.Size != 64<<20 || r.Cached || len(r.Config.Entrypoint) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	if !strings.HasPrefix(r.Path, cache) {
		t.Errorf("the disk is at %s", r.Path)
	}
	if out, status, err = runPull(t, t.Context(), "-q", "-s", "64M", ref); status != 0 || out != r.Path+"\n" {
		t.Errorf("%q, %v", out, err)
	}
	own := filepath.Join(t.TempDir(), "base.img")
	if out, status, err = runPull(t, t.Context(), "-q", "-o", own, "-s", "64M", ref); status != 0 || out != own+"\n" {
		t.Fatalf("%q, %v", out, err)
	}
	a, err1 := os.ReadFile(own)
	b, err2 := os.ReadFile(r.Path)
	if err1 != nil || err2 != nil || !bytes.Equal(a, b) {
		t.Errorf("two disks of one image differ: %v, %v", err1, err2)
	}
	f, err := os.Open(own)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if files, err := ext4test.Read(f); err != nil || files["/f"] == nil {
		t.Errorf("%v", err)
	}
	if _, status, err = runPull(t, t.Context(), "-o", own, ref); status != exitFailed || !errors.Is(err, os.ErrExist) {
		t.Errorf("onto a file: %v", err)
	}
	for _, args := range [][]string{{"--mirror", "x", ref}, {"-s", "0", ref}, {}, {ref, ref}} {
		if _, status, err := runPull(t, t.Context(), args...); status != exitUsage {
			t.Errorf("%q: status %d, %v", args, status, err)
		}
	}
	// An overlay stands on it as on any base.
	cow := filepath.Join(t.TempDir(), "root.cow")
	root := newRootCommand()
	root.SetArgs([]string{"create", "-q", "-b", r.Path, cow})
	if err := root.ExecuteContext(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestPullInterrupted has Ctrl-C while a layer is on its way.
func TestPullInterrupted(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("MOOVM_CACHE", cache)
	img := ocitest.Image(t, v1.Config{}, ocitest.Tar(t, ocitest.File("f", "data")))
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	ref := ocitest.Push(t, ocitest.Registry(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, digest.String()) {
				h.ServeHTTP(w, r)
				return
			}
			_, _ = io.WriteString(w, "some")
			_ = http.NewResponseController(w).Flush()
			cancel(errInterrupted)
			<-r.Context().Done()
		})
	}), "image:v1", img)
	if _, status, err := runPull(t, ctx, ref); status != exitInterrupted {
		t.Errorf("status %d, %v", status, err)
	}
	err = filepath.WalkDir(cache, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			t.Errorf("left: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// TestImageRequest has the flags of run that go with --image.
func TestImageRequest(t *testing.T) {
	for _, c := range []struct {
		m    machineFlags
		want string
	}{
		{machineFlags{image: "x", base: "y"}, "--image or --base"},
		{machineFlags{image: "x", initrd: "y"}, "--initrd or --image"},
		{machineFlags{pull: pullFlags{size: 1}}, "are for --image"},
		{machineFlags{image: "x", pull: pullFlags{mirrors: []string{"y"}}}, "REGISTRY=HOST"},
		{machineFlags{image: "x", tty: true}, ""},
	} {
		c.m.accel, c.m.virtio, c.m.cpus = "auto", "pci", 1
		_, err := c.m.request(nil)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%+v: %v; want %q", c.m, err, c.want)
		}
	}
}

func TestTakeImage(t *testing.T) {
	t.Setenv("MOOVM_CACHE", t.TempDir())
	img := ocitest.Image(t, v1.Config{Entrypoint: []string{"/bin/e"}, Cmd: []string{"c"}, Env: []string{"A=b"}, User: "u", WorkingDir: "/w"}, ocitest.Tar(t, ocitest.File("f", "data")))
	bare := ocitest.Image(t, v1.Config{}, ocitest.Tar(t, ocitest.File("f", "data")))
	g := &globals{quiet: true}
	r := &machineRequest{image: ocitest.Folder(t, img), command: []string{"arg"}}
	r.create.Size = 64 << 20
	if err := r.takeImage(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	dir, user, env := r.imageCommand()
	if strings.Join(r.command, " ") != "/bin/e arg" || dir != "/w" || user != "u" || len(env) != 1 || !strings.HasSuffix(r.base, ".img,format=raw") {
		t.Errorf("%+v: %s, %s, %s", r, dir, user, env)
	}
	// In the sandbox, what the other side found is taken.
	b, err := json.Marshal(r.root)
	if err != nil {
		t.Fatal(err)
	}
	inner := &machineRequest{image: "no/such:image"}
	if err := inner.takeImage(t.Context(), &globals{relayedRoot: string(b)}); err != nil || inner.base != r.base || strings.Join(inner.command, " ") != "/bin/e c" {
		t.Errorf("%+v, %v", inner, err)
	}
	r = &machineRequest{image: ocitest.Folder(t, bare)}
	r.create.Size = 64 << 20
	if err := r.takeImage(t.Context(), g); err == nil || !strings.Contains(err.Error(), "behind --") {
		t.Error(err)
	}
}
