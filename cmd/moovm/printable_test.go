package main

import "testing"

func TestPrintable(t *testing.T) {
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
		if got := printable(s); got != want {
			t.Errorf("printable(%q) = %s; want %s", s, got, want)
		}
	}
	if got, want := printableLines("a\n\tb\x1b\r"), "a\n\tb\\x1b\\x0d"; got != want {
		t.Errorf("printableLines: %q, want %q", got, want)
	}
}
