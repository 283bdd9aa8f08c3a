package guest

import (
	"iter"
	"strconv"
	"strings"
)

// splitCmdline yields the words of a kernel command line. As in the kernel,
// blanks within double quotes do not end a word.
func splitCmdline(line string) iter.Seq[string] {
	return func(yield func(string) bool) {
		start, quoted := -1, false
		for i := 0; i < len(line); i++ {
			c := line[i]
			if c == '"' {
				quoted = !quoted
			}
			if blank := c == ' ' || c == '\t' || c == '\n'; blank && !quoted {
				if start >= 0 && !yield(line[start:i]) {
					return
				}
				start = -1
			} else if start < 0 {
				start = i
			}
		}
		if start >= 0 {
			yield(line[start:])
		}
	}
}

// bootParams are the words of a kernel command line that a root file system is
// found by. They are the init's business, not the kernel's.
type bootParams struct {
	root     Root
	readOnly *bool // ro or rw was given
	init     string
	rest     []string // the other words
}

// parseBootParams reads root=, rootfstype=, rootflags=, rootwait, rootdelay=,
// ro, rw and init= of a command line.
func parseBootParams(line string) bootParams {
	var p bootParams
	for w := range splitCmdline(line) {
		key, value, _ := strings.Cut(w, "=")
		value = strings.Trim(value, `"`)
		switch key {
		case "root":
			p.root.Device = value
		case "rootfstype":
			p.root.Type = value
		case "rootflags":
			p.root.Options = value
		case "rootdelay", "rootwait":
			if n, err := strconv.Atoi(value); err == nil && n > 0 {
				p.root.WaitSeconds = n
			} else if key == "rootwait" {
				p.root.WaitSeconds = 3600
			}
		case "ro", "rw":
			ro := key == "ro"
			p.readOnly = &ro
		case "init":
			p.init = value
		default:
			p.rest = append(p.rest, w)
		}
	}
	return p
}

// joinOptions joins two lists of mount options.
func joinOptions(a, b string) string {
	if b == "" {
		return a
	}
	return a + "," + b
}
