package kmod

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// StaticNode is a device node that is there before its driver: opening it makes
// the kernel load the module.
type StaticNode struct {
	Module string // as modprobe takes it
	Name   string // below /dev, such as net/tun
	Block  bool   // a block device; otherwise a character device
	Major  uint32
	Minor  uint32
}

// Bounds of modules.devname; a kernel of today's has some 20 nodes in 500 bytes.
const (
	maxStaticNodes = 1000
	maxDevname     = 1 << 20
)

// StaticNodes returns the nodes that modules.devname in the modules folder dir
// lists. Without such a file there are none. Lines that are no nodes, or would
// lead out of /dev, are left out.
func StaticNodes(dir string) ([]StaticNode, error) {
	f, err := os.Open(filepath.Join(dir, "modules.devname"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("static device nodes: %w", err)
	}
	defer f.Close()
	nodes, err := parseStaticNodes(f)
	if err != nil {
		return nil, fmt.Errorf("static device nodes: %s: %w", f.Name(), err)
	}
	return nodes, nil
}

// parseStaticNodes reads lines like "tun net/tun c10:200".
func parseStaticNodes(r io.Reader) (nodes []StaticNode, err error) {
	s := bufio.NewScanner(io.LimitReader(r, maxDevname))
	for s.Scan() && len(nodes) < maxStaticNodes {
		if n, ok := parseStaticNode(s.Text()); ok {
			nodes = append(nodes, n)
		}
	}
	return nodes, s.Err()
}

func parseStaticNode(line string) (n StaticNode, ok bool) {
	f := strings.Fields(line)
	if len(f) != 3 || len(f[2]) < 2 || strings.ContainsAny(f[1], "\x00") || f[1] == "." || !filepath.IsLocal(f[1]) || len(f[1]) > 200 {
		return n, false
	}
	major, minor, ok := strings.Cut(f[2][1:], ":")
	// The kernel's dev_t has 12 bits for one and 20 for the other.
	x, err1 := strconv.ParseUint(major, 10, 12)
	y, err2 := strconv.ParseUint(minor, 10, 20)
	if kind := f[2][0]; !ok || err1 != nil || err2 != nil || kind != 'c' && kind != 'b' {
		return n, false
	}
	return StaticNode{Module: f[0], Name: f[1], Block: f[2][0] == 'b', Major: uint32(x), Minor: uint32(y)}, true
}
