package printable

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestText(t *testing.T) {
	for s, want := range map[string]string{
		"":                 "",
		"plain ünï 日本.img": "plain ünï 日本.img",
		"\x1b]0;title\x07": `\x1b]0;title\x07`,
		"a\nb\tc\rd\x7f":   `a\x0ab\x09c\x0dd\x7f`,
		"\xff\xc3":         `\xff\xc3`,
		"\u009b2J":         `\u009b2J`, // CSI in one character
		"\u202egnp.exe":    `\u202egnp.exe`,
		"\U000e0001":       `\U000e0001`,
		"\ufffd":           "\ufffd", // itself, not a bad byte
	} {
		if got := Text(s); got != want {
			t.Errorf("Text(%q) = %s; want %s", s, got, want)
		}
	}
	if got, want := Lines("a\n\tb\x1b\r"), "a\n\tb\\x1b\\x0d"; got != want {
		t.Errorf("Lines: %q, want %q", got, want)
	}
}

func FuzzText(f *testing.F) {
	f.Add("a\x1b\xff\u202e")
	f.Fuzz(func(t *testing.T, s string) {
		for _, got := range []string{Text(s), strings.NewReplacer("\n", "", "\t", "").Replace(Lines(s))} {
			if !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) && !strings.ContainsRune(s, utf8.RuneError) {
				t.Errorf("%q is shown as %q", s, got)
			}
			if len(got) > 4*len(s) {
				t.Errorf("%d bytes became %d", len(s), len(got))
			}
		}
	})
}
