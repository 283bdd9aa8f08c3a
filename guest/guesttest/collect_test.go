package guesttest

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// collected is a run's folder on both sides: what a guest put into out, and
// what the flags make of it in dir.
type collected struct {
	t        *testing.T
	out, dir string
	place    map[string]string // where the guest writes, by the flag
	o        *outputs
}

func newCollected(t *testing.T, args ...string) *collected {
	t.Helper()
	c := &collected{t: t, out: t.TempDir(), dir: t.TempDir(), place: map[string]string{}}
	var got []string
	got, _, c.o = redirect(args, nil, c.dir, c.out)
	for _, a := range got {
		name, value, _ := strings.Cut(a, "=")
		c.place[strings.TrimPrefix(name, "-test.")] = value
	}
	if err := c.o.prepare(); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *collected) write(path, text string) {
	c.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o777), os.WriteFile(path, []byte(text), 0o777)); err != nil {
		c.t.Fatal(err)
	}
}

// host returns what is in the user's folder, with executables marked.
func (c *collected) host() map[string]string {
	c.t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(c.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if st, _ := d.Info(); st.Mode()&0o111 != 0 {
			b = append(b, " (executable)"...)
		}
		rel, _ := filepath.Rel(c.dir, path)
		files[rel] = string(b)
		return err
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return files
}

func (c *collected) want(want map[string]string) {
	c.t.Helper()
	got := c.host()
	for name, text := range got {
		if w, ok := want[name]; !ok || w != text {
			c.t.Errorf("%s is %q, want %q", name, text, w)
		}
	}
	for name := range want {
		if _, ok := got[name]; !ok {
			c.t.Errorf("%s is missing", name)
		}
	}
}

// A guest that writes names of its own into the folders it is given changes
// nothing of the package.
func TestCollectOnlyImpliedNames(t *testing.T) {
	const meta = "covmeta.0123456789abcdef0123456789abcdef"
	c := newCollected(t, "-test.artifacts", "-test.outputdir=.", "-test.gocoverdir=.", "-test.cpuprofile=cpu")
	c.write(filepath.Join(c.dir, "main.go"), "mine")
	for _, d := range []string{c.place["outputdir"], c.place["gocoverdir"]} {
		c.write(d+"/main.go", "theirs")
		c.write(d+"/.git/hooks/pre-commit", "theirs")
		c.write(d+"/covmeta.x", "theirs")
		c.write(d+"/covmeta.0123456789abcdef0123456789abcdef/x", "theirs")
	}
	os.RemoveAll(c.place["gocoverdir"] + "/" + meta)
	c.write(c.place["gocoverdir"]+"/"+meta, "meta")
	c.write(c.place["outputdir"]+"/_artifacts/TestX/1/log", "log")
	c.write(filepath.Dir(c.place["cpuprofile"])+"/other", "theirs")
	c.write(c.place["cpuprofile"], "profile")
	if err := c.o.collect(newCollector()); err != nil {
		t.Fatal(err)
	}
	c.want(map[string]string{"main.go": "mine (executable)", meta: "meta", "_artifacts/TestX/1/log": "log", "cpu": "profile"})
	if _, err := os.Stat(c.dir + "/.git"); err == nil {
		t.Error("a folder of the guest's came back")
	}
	// Without -test.artifacts an output folder brings nothing.
	c = newCollected(t, "-test.outputdir=sub")
	c.write(c.place["outputdir"]+"/_artifacts/x", "theirs")
	if err := c.o.collect(newCollector()); err != nil {
		t.Fatal(err)
	}
	c.want(nil)
}

// What is on the host already stays as it is.
func TestCollectWritesOverNothing(t *testing.T) {
	outside := t.TempDir()
	for name, put := range map[string]func(c *collected) error{
		"file": func(c *collected) error {
			c.write(c.dir+"/_artifacts/x/f", "mine")
			return nil
		},
		"link":          func(c *collected) error { return os.Symlink(outside, c.dir+"/_artifacts") },
		"dangling link": func(c *collected) error { return os.Symlink(outside+"/none", c.dir+"/_artifacts") },
		"link below": func(c *collected) error {
			return errors.Join(os.Mkdir(c.dir+"/_artifacts", 0o777), os.Symlink(outside, c.dir+"/_artifacts/x"))
		},
		"link to inside": func(c *collected) error {
			return errors.Join(os.Mkdir(c.dir+"/_artifacts", 0o777), os.Symlink("..", c.dir+"/_artifacts/x"))
		},
		"link for a file": func(c *collected) error {
			return errors.Join(os.MkdirAll(c.dir+"/_artifacts/x", 0o777), os.Symlink(outside+"/new", c.dir+"/_artifacts/x/f"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCollected(t, "-test.artifacts", "-test.outputdir=.")
			c.write(c.place["outputdir"]+"/_artifacts/x/f", "theirs")
			if err := put(c); err != nil {
				t.Fatal(err)
			}
			before := c.host()
			if err := c.o.collect(newCollector()); err == nil {
				t.Error("it was collected")
			}
			c.want(before)
			if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
				t.Errorf("outside there are %v, %v", left, err)
			}
		})
	}
}

// A file that a flag names is replaced, not written through.
func TestCollectNamedFile(t *testing.T) {
	c := newCollected(t, "-test.cpuprofile=cpu", "-test.trace=link", "-test.memprofile=fifo")
	c.write(c.dir+"/cpu", "old")
	c.write(c.dir+"/other", "other")
	if err := errors.Join(os.Link(c.dir+"/other", c.dir+"/hard"), os.Remove(c.dir+"/cpu"), os.Link(c.dir+"/other", c.dir+"/cpu")); err != nil {
		t.Fatal(err)
	}
	c.write(c.place["cpuprofile"], "new")
	if err := c.o.collect(newCollector()); err != nil {
		t.Fatal(err)
	}
	c.want(map[string]string{"cpu": "new", "hard": "other (executable)", "other": "other (executable)"})
	os.Remove(c.place["cpuprofile"])

	if err := os.Symlink("other", c.dir+"/link"); err != nil {
		t.Fatal(err)
	}
	c.write(c.place["trace"], "through")
	if err := c.o.collect(newCollector()); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("through a link: %v", err)
	}
	c.want(map[string]string{"cpu": "new", "hard": "other (executable)", "other": "other (executable)"})
	os.Remove(c.place["trace"])

	if err := unix.Mkfifo(c.dir+"/fifo", 0o666); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(c.dir+"/fifo", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	c.write(c.place["memprofile"], "stream")
	if err := c.o.collect(newCollector()); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 6)
	if n, err := reader.Read(b); err != nil || string(b[:n]) != "stream" {
		t.Errorf("the pipe got %q, %v", b[:n], err)
	}
}

func TestCollectBounds(t *testing.T) {
	const sparse = 10 << 30
	c := newCollected(t, "-test.cpuprofile=cpu", "-test.artifacts", "-test.outputdir=.")
	c.write(c.place["cpuprofile"], "start")
	if err := os.Truncate(c.place["cpuprofile"], sparse); err != nil {
		t.Fatal(err)
	}
	if err := c.o.collect(newCollector()); err != nil { // more than it may bring, but for the holes
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(c.dir+"/cpu", &st); err != nil || st.Size != sparse || st.Blocks*512 > 1<<20 {
		t.Errorf("%d bytes, %d on the disk, %v", st.Size, st.Blocks*512, err)
	}
	os.Remove(c.place["cpuprofile"])
	os.Remove(c.dir + "/cpu")

	deep := c.place["outputdir"] + "/_artifacts" + strings.Repeat("/d", maxDepth+1)
	c.write(deep+"/f", "deep")
	if err := c.o.collect(newCollector()); !errors.Is(err, ErrTooMuch) {
		t.Errorf("deep folders: %v", err)
	}
	os.RemoveAll(c.place["outputdir"] + "/_artifacts/d")
	for i := range 5 {
		c.write(c.place["outputdir"]+"/_artifacts/"+strconv.Itoa(i), "12345")
	}
	small := newCollector()
	small.files = 4
	if err := c.o.collect(small); !errors.Is(err, ErrTooMuch) {
		t.Errorf("many files: %v", err)
	}
	os.RemoveAll(c.dir + "/_artifacts")
	small = newCollector()
	small.bytes = 12
	if err := c.o.collect(small); !errors.Is(err, ErrTooMuch) {
		t.Errorf("many bytes: %v", err)
	}
	for name, text := range c.host() {
		if text != "12345" {
			t.Errorf("a half of %s is left: %q", name, text)
		}
	}
}

// Core files have the names of core files, and hide nothing else.
func TestSaveArtifacts(t *testing.T) {
	scratch, target := t.TempDir(), t.TempDir()
	c := &collected{t: t, dir: target}
	c.write(scratch+"/artifacts/console.log", "console")
	c.write(scratch+"/artifacts/other", "theirs")
	c.write(scratch+"/out/cores/core.x.1", "core")
	c.write(scratch+"/out/cores/console.log", "theirs")
	c.write(scratch+"/out/cores/core.d/core.x", "theirs")
	r := &runner{back: newCollector()}
	if err := r.saveArtifacts(scratch, scratch+"/artifacts", scratch+"/out", target); err != nil {
		t.Fatal(err)
	}
	c.want(map[string]string{"console.log": "console", "core.x.1": "core"})
}
