package control

import (
	"strings"

	"github.com/moovm/moovm/internal/printable"
)

// text makes text of the guest safe for a terminal and a log line.
func text(s string) string {
	return printable.Text(strings.NewReplacer("\n", " ", "\t", " ").Replace(s[:min(len(s), MaxText)]))
}
