// Package printable shows text from outside (images, guests, peers, file names)
// so that a terminal does nothing but show it.
package printable

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Text shows a string in one line: control characters and bytes that are no
// UTF-8 become \xNN, other characters that cannot be seen (they change the
// direction of text, or have no width) \uNNNN. It is up to four times as long.
func Text(s string) string { return escape(s, "") }

// Lines is Text for a text of several lines: line feeds and tabs stay.
func Lines(s string) string { return escape(s, "\n\t") }

func escape(s, keep string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1, r < utf8.RuneSelf && !unicode.IsPrint(r) && !strings.ContainsRune(keep, r):
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case r < utf8.RuneSelf || unicode.IsPrint(r):
			b.WriteString(s[i : i+n])
		case r > 0xffff:
			fmt.Fprintf(&b, `\U%08x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		i += n
	}
	return b.String()
}
