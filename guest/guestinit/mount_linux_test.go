package guestinit

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moovm/moovm/guest/control"
	"golang.org/x/sys/unix"
)

func TestParseMountOptions(t *testing.T) {
	for options, want := range map[string]struct {
		flags uintptr
		data  string
	}{
		"":                              {0, ""},
		"defaults":                      {0, ""},
		"ro,nosuid,data=ordered":        {unix.MS_RDONLY | unix.MS_NOSUID, "data=ordered"},
		"ro,rw":                         {0, ""},
		"trans=virtio,version=9p2000.L": {0, "trans=virtio,version=9p2000.L"},
		"noatime,x,,y,rbind":            {unix.MS_NOATIME | unix.MS_BIND | unix.MS_REC, "x,y"},
	} {
		if flags, data := parseMountOptions(options); flags != want.flags || data != want.data {
			t.Errorf("%q: got %#x %q", options, flags, data)
		}
	}
	if got := unescapeMount(`/a\040b\134c`); got != `/a b\c` {
		t.Error(got)
	}
}

func TestLookProgram(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "a/data"), nil)
	for _, p := range []string{"a/prog", "b/data", "b/prog"} {
		writeFile(t, filepath.Join(dir, p), nil)
		if err := os.Chmod(filepath.Join(dir, p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "a") + ":" + filepath.Join(dir, "b")
	for name, want := range map[string]string{"prog": "a/prog", "data": "b/data", filepath.Join(dir, "b/prog"): "b/prog"} {
		if got, err := lookProgram(name, path, ""); err != nil || got != filepath.Join(dir, want) {
			t.Errorf("%s: %s, %v", name, got, err)
		}
	}
	if got, err := lookProgram("./prog", path, filepath.Join(dir, "b")); err != nil || got != filepath.Join(dir, "b/prog") {
		t.Errorf("%s, %v", got, err)
	}
	for name, status := range map[string]int{"none": 127, filepath.Join(dir, "none"): 127, dir: 126, filepath.Join(dir, "a/data"): 126} {
		_, err := lookProgram(name, path, "")
		var s *stageError
		if !errors.As(err, &s) || s.status != status || s.kind != control.FailCommand {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := lookProgram("data", filepath.Join(dir, "a"), ""); err == nil || !strings.Contains(err.Error(), "permission denied") {
		t.Error(err)
	}
}

// startCommand is the init's way to run a program; it works in any process.
func TestStartCommand(t *testing.T) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("sh is missing")
	}
	dir := t.TempDir()
	for _, terminal := range []bool{false, true} {
		c := control.Command{Args: []string{"sh", "-c", "pwd; echo $X; read line; echo $line; echo err >&2; kill -9 $$"}, Dir: dir, Terminal: terminal, Rows: 5, Columns: 6}
		p, err := startCommand(c, sh, []string{"X=value"}, nil)
		if err != nil {
			if terminal {
				t.Skipf("no pseudo terminals here: %v", err)
			}
			t.Fatal(err)
		}
		if _, err := p.stdin.WriteString("typed\n"); err != nil {
			t.Error(err)
		}
		var text strings.Builder
		buf := make([]byte, 100)
		for {
			n, err := p.stdout.Read(buf)
			text.Write(buf[:n])
			if err != nil {
				break
			}
		}
		var ws unix.WaitStatus
		if _, err := unix.Wait4(p.pid, &ws, 0, nil); err != nil || !ws.Signaled() || ws.Signal() != 9 {
			t.Errorf("status %v, %v", ws, err)
		}
		want := []string{dir, "value", "typed"}
		if terminal {
			want = append(want, "err")
		}
		for _, w := range want {
			if !strings.Contains(text.String(), w) {
				t.Errorf("terminal %v: no %q in %q", terminal, w, text.String())
			}
		}
		p.stdin.Close()
		if !terminal {
			p.stdout.Close()
			p.stderr.Close()
		}
	}
	if _, err := startCommand(control.Command{Args: []string{"x"}}, filepath.Join(dir, "none"), nil, nil); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
}
