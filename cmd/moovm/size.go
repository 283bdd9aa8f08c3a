package main

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// parseSize reads a size in bytes with an optional binary suffix: 512, 64K,
// 10M, 2G, 1T.
func parseSize(s string) (int64, error) {
	digits, shift := s, 0
	if n := len(s); n > 0 {
		if i := strings.IndexByte("KMGT", upper(s[n-1])); i >= 0 {
			digits, shift = s[:n-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 0 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is not a size; write bytes with an optional K, M, G or T, such as 10G", s)
	}
	return n << shift, nil
}

func upper(c byte) byte {
	if 'a' <= c && c <= 'z' {
		return c - 'a' + 'A'
	}
	return c
}

// sizeFlag is a size on the command line; it satisfies pflag.Value.
type sizeFlag int64

func (f *sizeFlag) Set(s string) error {
	n, err := parseSize(s)
	*f = sizeFlag(n)
	return err
}

func (f *sizeFlag) String() string { return formatSize(int64(*f)) }
func (f *sizeFlag) Type() string   { return "SIZE" }

// formatSize is the inverse of parseSize: the largest suffix that is exact.
func formatSize(n int64) string {
	suffixes := []string{"", "K", "M", "G", "T"}
	i := 0
	for n != 0 && n%1024 == 0 && i < len(suffixes)-1 {
		n /= 1024
		i++
	}
	return strconv.FormatInt(n, 10) + suffixes[i]
}
