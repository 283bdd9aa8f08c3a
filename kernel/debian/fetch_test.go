package debian

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// tools puts stand-ins for apt and dpkg into PATH, that say what they were
// asked in the file log, and have one kernel.
func tools(t *testing.T, change map[string]string) (log string) {
	t.Helper()
	dir := t.TempDir()
	log = filepath.Join(dir, "log")
	const head = "#!/bin/sh\necho \"$(basename $0) $*\" >> "
	for name, script := range map[string]string{
		"apt-cache": `echo linux-image-amd64; echo "  Depends: linux-image-6.1.0-9-amd64"`,
		"apt-get": `case "$*" in *indextargets*) echo "mirror://m main Packages bookworm-security"; echo "mirror://debian main Packages bookworm";;
*update*) ;; *download*) touch linux-image.deb;; esac`,
		"dpkg":   `mkdir -p $3/boot $3/lib/modules/6.1.0-9-amd64; echo kernel > $3/boot/vmlinuz-6.1.0-9-amd64`,
		"depmod": `touch $2/lib/modules/$3/modules.dep`,
	} {
		if s, ok := change[name]; ok {
			script = s
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(head+log+"\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return log
}

func TestFetch(t *testing.T) {
	for _, name := range Names() {
		t.Run(name, func(t *testing.T) {
			log, cache := tools(t, nil), t.TempDir()
			var said []string
			for range 2 { // the second from the cache
				path, err := Fetch(t.Context(), cache, name, func(s string) { said = append(said, s) })
				if err != nil || path != filepath.Join(cache, "kernel", name, "boot", "vmlinuz-6.1.0-9-amd64") {
					t.Fatalf("%q, %v", path, err)
				}
			}
			if _, err := os.Stat(filepath.Join(cache, "kernel", name, "lib/modules/6.1.0-9-amd64/modules.dep")); err != nil {
				t.Error(err)
			}
			b, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			asked := string(b)
			if strings.Count(asked, " download ") != 1 || strings.Contains(asked, "update") != (name != "current") ||
				strings.Contains(asked, "linux-image-cloud-amd64") != strings.HasSuffix(name, cloud) {
				t.Errorf("asked\n%s", asked)
			}
			if len(said) == 0 {
				t.Error("nothing was said")
			}
			onlyKernels(t, cache, 2)
		})
	}
}

// onlyKernels fails if anything else lies in the cache.
func onlyKernels(t *testing.T, cache string, n int) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(cache, "kernel"))
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != n {
		t.Errorf("%v in the cache, want %d entries", entries, n)
	}
}

func TestFetchAtOnce(t *testing.T) {
	tools(t, nil)
	cache := t.TempDir()
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			path, err := Fetch(t.Context(), cache, "6.1", nil)
			if err != nil {
				t.Error(err)
			} else if _, err := os.Stat(path); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	onlyKernels(t, cache, 2)
}

func TestFetchFails(t *testing.T) {
	for name, c := range map[string]struct {
		kernel string
		change map[string]string
		want   error
		text   string
	}{
		"unknown name":      {"6.2", nil, ErrName, "6.12"},
		"a path":            {"../x", nil, ErrName, "current"},
		"not in the index":  {"current", map[string]string{"apt-cache": "true"}, ErrApt, "apt-get update"},
		"no mirror":         {"6.1", map[string]string{"apt-get": "true"}, ErrApt, "sources"},
		"no download":       {"current", map[string]string{"apt-get": "true"}, ErrApt, "0 packages"},
		"a failed download": {"current", map[string]string{"apt-get": "echo first >&2; echo E: no network >&2; exit 100"}, ErrApt, "E: no network"},
		"a bad package":     {"current", map[string]string{"dpkg": "exit 2"}, ErrApt, "dpkg"},
		"no kernel in it":   {"current", map[string]string{"dpkg": "true"}, ErrApt, "no kernel"},
	} {
		t.Run(name, func(t *testing.T) {
			tools(t, c.change)
			cache := t.TempDir()
			path, err := Fetch(t.Context(), cache, c.kernel, nil)
			if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.text) || !strings.Contains(fmt.Sprint(err), "debian:"+c.kernel) {
				t.Errorf("%q, %v; want %v with %q", path, err, c.want, c.text)
			}
			if entries, _ := os.ReadDir(filepath.Join(cache, "kernel")); len(entries) > 0 {
				t.Errorf("left behind: %v", entries)
			}
		})
	}
}

func TestFetchInterrupted(t *testing.T) {
	tools(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	cache := t.TempDir()
	if _, err := Fetch(ctx, cache, "current", nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	onlyKernels(t, cache, 0)
}

func Example() {
	path, err := Fetch(context.Background(), "/nonexistent", "2.6", nil)
	fmt.Println(path, errors.Is(err, ErrName))
	// Output:  true
}
