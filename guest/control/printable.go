package control

import (
	"strings"
	"unicode/utf8"
)

// Printable makes text of the guest safe for a terminal and a log line.
func Printable(s string) string {
	if len(s) > MaxText {
		s = s[:MaxText]
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == utf8.RuneError:
			return '?'
		case r == '\n' || r == '\t':
			return ' '
		case r < ' ' || r >= 0x7f && r < 0xa0:
			return '?'
		}
		return r
	}, s)
}
