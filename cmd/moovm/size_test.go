package main

import "testing"

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "512": 512, "64K": 64 << 10, "10M": 10 << 20, "2G": 2 << 30, "1T": 1 << 40, "3g": 3 << 30, "8388607T": 8388607 << 40,
		"1GiB": 1 << 30, "1gb": 1 << 30, "1.5G": 3 << 29, "0.5k": 512, "8P": 8 << 50, "8191P": 8191 << 50, "9223372036854775807": 1<<63 - 1,
	} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("parseSize(%q) = %d, %v; want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "K", "-1", "+1", "+1G", "-1G", "1.5", "0.3K", ".5G", "1.G", "1e3", "1iB", "1B", "8192P", "8388608T", "9223372036854775808", "0x10", " 1", "1 "} {
		if got, err := parseSize(s); err == nil {
			t.Errorf("parseSize(%q) = %d; want an error", s, got)
		}
	}
}

func TestFormatSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 511: "511", 1024: "1K", 1536: "1536", 512 << 20: "512M", 1 << 40: "1T", 1 << 50: "1P", 1 << 60: "1024P"} {
		if got := formatSize(n); got != want {
			t.Errorf("formatSize(%d) = %q; want %q", n, got, want)
		}
	}
}
