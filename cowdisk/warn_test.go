package cowdisk

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

// An overlay that cannot notice that its base changed says so when it is made and when it is opened; another one says nothing.
func TestUnknownTimeWarns(t *testing.T) {
	for mtime, warnings := range map[int64]int{0: 1, 50: 0} {
		m := newMemFS()
		m.put("/d/base", randomBytes(8192, 1), mtime)
		var b bytes.Buffer
		log := slog.New(slog.NewTextHandler(&b, nil))
		count := func(when string) {
			t.Helper()
			if n := strings.Count(b.String(), "level=WARN"); n != warnings || n > 0 && !strings.Contains(b.String(), "image=/d/img backing=/d/base") {
				t.Errorf("base of time %d, %s: %q", mtime, when, &b)
			}
			b.Reset()
		}
		if err := Create("/d/img", CreateOptions{Backing: "base", FS: m, Log: log}); err != nil {
			t.Fatal(err)
		}
		count("create")
		d, err := Open("/d/img", Options{FS: m, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
		count("open")
	}
}
