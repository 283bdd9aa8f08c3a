package guest

import (
	"github.com/moovm/moovm/guest/control"
	"strconv"
	"strings"
)

// bootParams are the words of a kernel command line that a root file system is
// found by. They are the init's business, not the kernel's.
type bootParams struct {
	root     control.Root
	readOnly *bool // ro or rw was given
	init     string
	rest     []string // the other words
}

// parseBootParams reads root=, rootfstype=, rootflags=, rootwait, rootdelay=,
// ro, rw and init= of a command line.
func parseBootParams(line string) bootParams {
	var p bootParams
	for w := range control.SplitCmdline(line) {
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
