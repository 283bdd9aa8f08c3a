package guesttest

import (
	"bytes"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/moovm/moovm/internal/printable"
)

// tracker passes a test binary's output on and knows which test is running,
// as far as -test.v tells.
type tracker struct {
	out io.Writer

	mu      sync.Mutex
	line    lineCutter
	running []string // the latest last
	marked  bool     // -test.v=test2json: lines of the framework begin with ^V
	midLine bool     // the last byte was not a line's end
}

const marker = "\x16" // cmd/internal/test2json

const maxLine = 512 // what a framework line may be long to be looked at

// lineCutter makes lines of what comes in pieces; of a long one, its first
// maxLine bytes.
type lineCutter []byte

func (c *lineCutter) feed(p []byte, look func(line string)) {
	for len(p) > 0 {
		piece, rest, whole := bytes.Cut(p, []byte{'\n'})
		*c = append(*c, piece[:min(len(piece), maxLine-len(*c))]...)
		if !whole {
			return
		}
		look(string(*c))
		*c = (*c)[:0]
		p = rest
	}
}

func (t *tracker) Write(p []byte) (int, error) {
	t.mu.Lock()
	t.line.feed(p, t.look)
	if len(p) > 0 {
		t.midLine = p[len(p)-1] != '\n'
	}
	t.mu.Unlock()
	return t.out.Write(p)
}

func (t *tracker) look(line string) {
	line = strings.TrimLeft(line, " ")
	if rest, ok := strings.CutPrefix(line, marker); ok {
		line, t.marked = rest, true
	}
	if rest, ok := strings.CutPrefix(line, "=== "); ok {
		verb, name, _ := strings.Cut(rest, " ")
		name, _, _ = strings.Cut(strings.TrimSpace(name), " ")
		if name == "" {
			return
		}
		i := slices.Index(t.running, name)
		if i >= 0 {
			t.running = slices.Delete(t.running, i, i+1)
		}
		switch verb {
		case "RUN", "CONT", "NAME":
			t.running = append(t.running, name)
		case "PAUSE":
			t.running = slices.Insert(t.running, 0, name)
		}
		return
	}
	if rest, ok := strings.CutPrefix(line, "--- "); ok {
		_, name, _ := strings.Cut(rest, ": ")
		name, _, _ = strings.Cut(name, " ")
		if i := slices.Index(t.running, name); i >= 0 {
			t.running = slices.Delete(t.running, i, i+1)
		}
	}
}

// current is the test that ran last and has not ended; empty = none is known.
func (t *tracker) current() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.running) == 0 {
		return ""
	}
	return t.running[len(t.running)-1]
}

// fail writes the end of a run that the test binary could not write: the tests
// that were running have failed, and why.
func (t *tracker) fail(text string) {
	t.mu.Lock()
	running, marked, midLine := slices.Clone(t.running), t.marked, t.midLine
	t.mu.Unlock()
	mark := ""
	if marked {
		mark = marker
	}
	var b strings.Builder
	if midLine {
		b.WriteString("\n")
	}
	text = "    moovm: " + strings.ReplaceAll(strings.TrimRight(text, "\n"), "\n", "\n        ") + "\n"
	if len(running) == 0 {
		b.WriteString(text)
	}
	slices.Reverse(running)
	for i, name := range running {
		if i == 0 {
			if marked {
				fmt.Fprintf(&b, "%s=== NAME  %s\n", mark, name)
			}
			b.WriteString(text)
		}
		fmt.Fprintf(&b, "%s--- FAIL: %s (0.00s)\n", mark, name)
	}
	b.WriteString("FAIL\n")
	_, _ = io.WriteString(t.out, b.String())
}

// trouble is something bad that the kernel said.
type trouble struct {
	kind  string
	fatal bool   // a run with it has failed
	test  string // that was running; may be empty
	lines []string
}

// troubles are how the kernel says it, the first match counts. A panic is
// recognised by package guest.
var troubles = []struct {
	kind  string
	fatal bool
	re    *regexp.Regexp
}{
	{"lockup", true, regexp.MustCompile(`BUG: (soft lockup|workqueue lockup)|[Hh]ard LOCKUP|rcu: INFO: .*detected.* stall`)},
	{"hung task", true, regexp.MustCompile(`INFO: task .* blocked for more than`)},
	{"oops", true, regexp.MustCompile(`^(BUG: |Oops: |Oops\[|general protection fault|kernel BUG at|invalid opcode: |divide error: |UBSAN: |Unable to handle)`)},
	{"OOM kill", false, regexp.MustCompile(`(Out of memory|Memory cgroup out of memory).*: Killed process|oom-kill:`)},
}

const (
	maxTroubles     = 5
	maxTroubleLines = 30
)

// consoleWatch looks for trouble in what a kernel says. The guest writes it,
// so it is bounded.
type consoleWatch struct {
	out  io.Writer     // may be nil
	test func() string // that is running

	mu    sync.Mutex
	line  lineCutter
	found []trouble
	open  bool // the last one gets the following lines
}

var timestamp = regexp.MustCompile(`^\[ *[0-9]+\.[0-9]+\](\[[^]]*\])? ?`)

func (w *consoleWatch) Write(p []byte) (int, error) {
	w.mu.Lock()
	w.line.feed(p, func(line string) { w.look(clean(line)) })
	w.mu.Unlock()
	if w.out == nil {
		return len(p), nil
	}
	return w.out.Write(p)
}

func (w *consoleWatch) look(line string) {
	stamped := timestamp.MatchString(line)
	text := timestamp.ReplaceAllString(line, "")
	for _, t := range troubles {
		if !stamped || !t.re.MatchString(text) {
			continue
		}
		// The lines of one trouble match more than once.
		if w.open && len(w.found) > 0 && w.found[len(w.found)-1].kind == t.kind {
			break
		}
		if len(w.found) < maxTroubles {
			w.found = append(w.found, trouble{kind: t.kind, fatal: t.fatal, test: w.test()})
			w.open = true
		} else {
			w.open = false
		}
		break
	}
	if !w.open || line == "" {
		return
	}
	t := &w.found[len(w.found)-1]
	t.lines = append(t.lines, line)
	if len(t.lines) == maxTroubleLines || strings.Contains(text, "---[ end trace") {
		w.open = false
	}
}

func (w *consoleWatch) troubles() []trouble {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.found)
}

// clean makes a line of a console printable.
func clean(s string) string {
	return strings.TrimRight(printable.Text(strings.ReplaceAll(strings.TrimRight(s, "\r "), "\t", " ")), " ")
}

// describe makes a report of troubles: empty if there were none.
func describe(found []trouble) (text string, fatal bool) {
	var b strings.Builder
	for _, t := range found {
		article := "a"
		if strings.ContainsRune("aeioAEIO", rune(t.kind[0])) {
			article = "an"
		}
		fmt.Fprintf(&b, "the kernel had %s %s", article, t.kind)
		if t.test != "" {
			fmt.Fprintf(&b, " while %s ran", t.test)
		}
		b.WriteString(":\n")
		for _, l := range t.lines {
			b.WriteString("  | " + l + "\n")
		}
		fatal = fatal || t.fatal
	}
	return b.String(), fatal
}
