package main

import (
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

func TestEscapeReader(t *testing.T) {
	for _, c := range []struct {
		typed, sent string
		quits       int
		help        bool
	}{
		{"ls -l\n", "ls -l\n", 0, false},
		{"a\x01xb", "ab", 1, false},
		{"\x01h", "", 0, true},
		{"\x01\x01x", "\x01x", 0, false},
		{"\x01q\x01\x01", "\x01", 0, false},
	} {
		for name, wrap := range map[string]func(io.Reader) io.Reader{
			"whole":    func(r io.Reader) io.Reader { return r },
			"one byte": iotest.OneByteReader,
			"data+EOF": iotest.DataErrReader,
		} {
			var help strings.Builder
			quits := 0
			r := &escapeReader{in: wrap(strings.NewReader(c.typed)), help: &help, quit: func() { quits++ }}
			got, err := io.ReadAll(r)
			if err != nil || string(got) != c.sent || quits != c.quits || (help.Len() > 0) != c.help {
				t.Errorf("%s: typed %q: sent %q, %d quits, help %q, %v", name, c.typed, got, quits, help.String(), err)
			}
		}
	}
}
