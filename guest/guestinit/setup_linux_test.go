package guestinit

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/moovm/moovm/guest/control"
	"golang.org/x/sys/unix"
)

// What a line of the set-up writes comes before anything else, and its failure
// says which line it was.
func TestRunSetup(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ line, output, err string }{
		{"echo out; echo err >&2; pwd; echo $X; read nothing || echo end", "out\nerr\n" + dir + "\nvalue\nend\n", ""},
		{"sleep 1000 & echo $! there >pid; echo there; ls", "there\npid\n", ""}, // what it leaves running holds up nothing
		{"echo why >&2; exit 32", "why\n", `the set-up "echo why >&2; exit 32" failed in the guest, nothing else ran: exit status 32`},
		{"kill -9 $$", "", "signal 9"},
		{"no-such-program", "", "exit status 127"},
	} {
		var mu sync.Mutex // what is left running may still write
		var out strings.Builder
		err := runSetup(c.line, control.Command{Dir: dir}, []string{"X=value", "PATH=" + defaultPath}, func(p []byte) {
			mu.Lock()
			defer mu.Unlock()
			out.Write(p)
		})
		mu.Lock()
		got := out.String()
		mu.Unlock()
		if got != c.output && c.output != "" {
			t.Errorf("%s: wrote %q", c.line, got)
		}
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v", c.line, err)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "pid"))
	pid, _, _ := strings.Cut(string(b), " ")
	if n, _ := strconv.Atoi(pid); err != nil || n < 2 || unix.Kill(n, unix.SIGKILL) != nil {
		t.Errorf("what a set-up left running is gone: %q, %v", b, err)
	}
	if err := runSetup("true", control.Command{Dir: dir + "/none"}, nil, func([]byte) {}); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
}
