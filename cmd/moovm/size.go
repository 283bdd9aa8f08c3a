package main

import (
	"fmt"
	"math/big"
	"regexp"
	"strconv"
	"strings"
)

// sizePattern is a number, a fraction if need be, and a binary suffix. Signs are
// none: elsewhere "+1G" means "grow by", and a size that is guessed loses data.
var sizePattern = regexp.MustCompile(`^([0-9]+)(\.[0-9]+)?(?:([KMGTP])(?:I?B)?)?$`)

// parseSize reads a size in bytes with an optional binary suffix: 512, 64K, 10M,
// 1.5G, 2GiB, 1T, 8P. It is exact: a size that is no whole number of bytes is
// an error.
func parseSize(s string) (int64, error) {
	if strings.HasPrefix(s, "+") || strings.HasPrefix(s, "-") {
		return 0, fmt.Errorf("%q is relative; write the whole size without a sign, such as 10G", s)
	}
	wrong := fmt.Errorf("%q is not a size; write bytes with an optional K, M, G, T or P, such as 10G or 1.5G", s)
	if len(s) > 64 { // what follows is exact, whatever the length
		return 0, wrong
	}
	m := sizePattern.FindStringSubmatch(strings.ToUpper(s))
	if m == nil {
		return 0, wrong
	}
	n, ok := new(big.Rat).SetString(m[1] + m[2])
	if !ok {
		return 0, wrong
	}
	shift := 10 * (strings.Index(sizeSuffixes, m[3]) + 1)
	if m[3] == "" {
		shift = 0
	}
	n.Mul(n, new(big.Rat).SetInt64(1<<shift))
	if !n.IsInt() || !n.Num().IsInt64() {
		return 0, wrong
	}
	return n.Num().Int64(), nil
}

const sizeSuffixes = "KMGTP"

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
	i := 0
	for n != 0 && n%1024 == 0 && i < len(sizeSuffixes) {
		n /= 1024
		i++
	}
	suffix := ""
	if i > 0 {
		suffix = sizeSuffixes[i-1 : i]
	}
	return strconv.FormatInt(n, 10) + suffix
}
