package ratelog

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		base := slog.New(slog.NewTextHandler(&out, nil))
		log := New(base)
		lines := func() int { n := strings.Count(out.String(), "\n"); return n }
		flood := func() {
			for i := range 1000 {
				l := log
				if i%2 == 1 { // what is derived has the same limit
					l = log.With("queue", 1).WithGroup("g")
				}
				l.Warn("broken", "n", i)
			}
		}
		flood()
		if n := lines(); n != burst || strings.Contains(out.String(), "left_out") {
			t.Fatalf("%d lines of 1000, want %d:\n%s", n, burst, &out)
		}
		out.Reset()
		time.Sleep(interval - 1)
		log.Warn("too early")
		if n := lines(); n != 0 {
			t.Fatalf("%d lines within the second", n)
		}
		time.Sleep(1)
		log.Warn("later")
		if s := out.String(); !strings.Contains(s, "later") || !strings.Contains(s, "left_out=991\n") {
			t.Fatalf("a second later: %q", s)
		}
		out.Reset()
		time.Sleep(time.Hour)
		flood()
		if n := lines(); n != burst {
			t.Fatalf("%d lines after an hour, want %d", n, burst)
		}
		// Another source has its own.
		out.Reset()
		New(base).Warn("other")
		if lines() != 1 {
			t.Error("another device's line is gone")
		}
	})
}

func TestNil(t *testing.T) { New(nil).Error("nobody hears this") }
