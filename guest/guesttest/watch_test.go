package guesttest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/moovm/moovm/guest"
)

func TestTracker(t *testing.T) {
	var out bytes.Buffer
	tr := &tracker{out: &out}
	for _, step := range []struct{ text, current string }{
		{"=== RUN   TestA\n", "TestA"},
		{"=== RUN   TestA/sub\n    x_test.go:1: hello\n", "TestA/sub"},
		{"=== RUN   TestA/sub/", "TestA/sub"},
		{"deep\n", "TestA/sub/deep"},
		{"    --- PASS: TestA/sub/deep (0.00s)\n", "TestA/sub"},
		{"=== PAUSE TestA/sub\n=== RUN   TestA/other\n", "TestA/other"},
		{"=== CONT  TestA/sub\n", "TestA/sub"},
		{"=== NAME  TestA/other\n", "TestA/other"},
		{"--- PASS: TestA/other (0.00s)\n", "TestA/sub"},
		{strings.Repeat("x", 5000) + "\n=== \n--- \n", "TestA/sub"},
		{"--- FAIL: TestA/sub (1.00s)\n--- FAIL: TestA (1.00s)\nFAIL\n", ""},
		{marker + "=== RUN   TestB\npartial", "TestB"},
	} {
		n, err := tr.Write([]byte(step.text))
		if n != len(step.text) || err != nil || tr.current() != step.current {
			t.Errorf("after %.40q: %q, want %q", step.text, tr.current(), step.current)
		}
	}
	out.Reset()
	tr.fail("Kernel panic\n  | line")
	want := "\n" + marker + "=== NAME  TestB\n    moovm: Kernel panic\n          | line\n" + marker + "--- FAIL: TestB (0.00s)\nFAIL\n"
	if out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
	// Without -test.v nothing is known of tests.
	out.Reset()
	(&tracker{out: &out}).fail("gone")
	if out.String() != "    moovm: gone\nFAIL\n" {
		t.Errorf("%q", out.String())
	}
}

const oopsText = "[    5.1] BUG: kernel NULL pointer dereference, address: 0000000000000010\r\n" +
	"[    5.2] #PF: supervisor read access in kernel mode\r\n[    5.2] Oops: 0000 [#1] PREEMPT SMP NOPTI\r\n" +
	"[    5.3] RIP: 0010:foo+0x1/0x2\r\n[    5.4] ---[ end trace 0000 ]---\r\n[    5.5] later\r\n"

func TestConsoleWatch(t *testing.T) {
	var out bytes.Buffer
	w := &consoleWatch{out: &out, test: func() string { return "TestX" }}
	for _, half := range []string{oopsText[:30], oopsText[30:]} {
		if n, err := w.Write([]byte(half)); n != len(half) || err != nil {
			t.Fatal(n, err)
		}
	}
	found := w.troubles()
	if len(found) != 1 || found[0].kind != "oops" || !found[0].fatal || found[0].test != "TestX" || len(found[0].lines) != 5 {
		t.Fatalf("%+v", found)
	}
	if out.String() != oopsText {
		t.Error("not all was passed on")
	}
	for text, want := range map[string]string{
		"[ 1.0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [x:1]":       "lockup",
		"[ 1.0] rcu: INFO: rcu_preempt self-detected stall on CPU":             "lockup",
		"[ 1.0] rcu: INFO: rcu_sched detected stalls on CPUs/tasks:":           "lockup",
		"[ 1.0] INFO: task sh:12 blocked for more than 120 seconds.":           "hung task",
		"[ 1.0] general protection fault, probably for non-canonical address":  "oops",
		"[ 1.0] kernel BUG at fs/ext4/inode.c:1!":                              "oops",
		"[ 1.0] Out of memory: Killed process 77 (eater) total-vm:1kB":         "OOM kill",
		"[ 1.0][  T77] Memory cgroup out of memory: Killed process 77 (eater)": "OOM kill",
		"BUG: a program says it":                                               "",
		"[ 1.0] systemd[1]: Started a BUG: hunt":                               "",
		"[ 1.0] x" + strings.Repeat("y", 10000):                                "",
	} {
		w := &consoleWatch{test: func() string { return "" }}
		fmt.Fprintf(w, "[    0.5] before\n%s\n", text)
		kind := ""
		if f := w.troubles(); len(f) == 1 {
			kind = f[0].kind
		}
		if kind != want {
			t.Errorf("%.60q: %q, want %q", text, kind, want)
		}
	}
	// A guest that goes on about it for ever costs no more.
	w = &consoleWatch{test: func() string { return "" }}
	for range 1000 {
		fmt.Fprint(w, oopsText)
	}
	if f := w.troubles(); len(f) != maxTroubles {
		t.Errorf("%d troubles are kept", len(f))
	}
}

// verdict reports what the test binary could not say itself.
func TestVerdict(t *testing.T) {
	panicked := &guest.PanicError{Cause: "sysrq", Console: []string{"end"}}
	for name, c := range map[string]struct {
		status  int
		err     error
		console string
		ignore  bool
		want    int
		out     string // on stdout, within the test's report
		errText string
	}{
		"passed":           {},
		"failed":           {status: 1, want: 1},
		"panic":            {status: 126, err: panicked, want: 126, out: "moovm: Kernel panic - not syncing: sysrq"},
		"timeout":          {status: 124, err: &guest.StoppedError{Err: context.DeadlineExceeded}, want: 124, out: "not done after"},
		"cut short":        {status: 125, err: &guest.BootError{Problem: "reset", Err: guest.ErrCutShort}, want: 125, out: "ended before its command"},
		"oops, passed":     {console: oopsText, want: 1, out: "the kernel had an oops while TestX ran:"},
		"oops, ignored":    {console: oopsText, ignore: true},
		"oops, failed":     {status: 2, console: oopsText, want: 2},
		"oops, then panic": {status: 126, err: panicked, console: oopsText, want: 126, out: "RIP: 0010:foo"},
		"OOM kill":         {console: "[ 1.0] Out of memory: Killed process 7 (x)\n"},
		"no boot":          {status: 125, err: &guest.BootError{Problem: "slow", Err: guest.ErrNoStart}, want: 125, errText: "Usual causes"},
		"no module":        {status: 125, err: errors.New("no module"), want: 125, errText: "no module"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			tr := &tracker{out: &out}
			fmt.Fprintln(tr, "=== RUN   TestX")
			w := &consoleWatch{test: tr.current}
			fmt.Fprint(w, c.console)
			status, err := verdict(&Config{IgnoreOops: c.ignore}, c.status, c.err, tr, w)
			if status != c.want || (err == nil) != (c.errText == "") || err != nil && !strings.Contains(err.Error(), c.errText) {
				t.Errorf("status %d, %v", status, err)
			}
			report := strings.TrimPrefix(out.String(), "=== RUN   TestX\n")
			if (report == "") != (c.out == "") || !strings.Contains(report, c.out) {
				t.Errorf("reported %q, want %q", report, c.out)
			}
			if report != "" && !strings.HasSuffix(report, "--- FAIL: TestX (0.00s)\nFAIL\n") {
				t.Errorf("%q is not the end of a test's report", report)
			}
		})
	}
}

func TestSilentReset(t *testing.T) {
	boot := func(err error, console ...string) error {
		return fmt.Errorf("x: %w", &guest.BootError{Problem: "y", Err: err, Console: console})
	}
	for name, c := range map[string]struct {
		err  error
		want bool
	}{
		"silent":    {boot(guest.ErrNoStart), true},
		"messages":  {boot(guest.ErrNoStart, "no root"), false},
		"slow":      {boot(guest.ErrSlowStart), false},
		"cut short": {boot(guest.ErrCutShort), false},
		"other":     {errors.New("no module"), false},
		"none":      {nil, false},
	} {
		if got := silentReset(c.err); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}
