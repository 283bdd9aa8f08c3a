package kmod

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/moovm/moovm/internal/unpack"
)

// maxModule bounds a module, packed and unpacked, in bytes. The largest
// (amdgpu) are below 40 MiB.
const maxModule = 256 << 20

// moduleInfo is what a module says about itself in its .modinfo section.
type moduleInfo struct {
	depends  []string // as names
	aliases  []string
	softdeps moduleSoftdeps
	vermagic string
}

// isModuleFile says whether path is named like a module.
func isModuleFile(path string) bool {
	base := filepath.Base(path)
	for _, s := range []string{".ko", ".ko.gz", ".ko.xz", ".ko.zst"} {
		if strings.HasSuffix(base, s) {
			return true
		}
	}
	return false
}

// ModuleName is the name of the module in a file: base name without suffix,
// - written as _.
func ModuleName(path string) string {
	base := filepath.Base(path)
	if i := strings.Index(base, ".ko"); i >= 0 {
		base = base[:i]
	}
	return Underscores(base)
}

// Underscores writes - as _, which are the same in module names and aliases,
// but not within brackets of a pattern.
func Underscores(s string) string {
	if !strings.Contains(s, "-") {
		return s
	}
	b := []byte(s)
	depth := 0
	for i, c := range b {
		switch c {
		case '[':
			depth++
		case ']':
			depth--
		case '-':
			if depth <= 0 {
				b[i] = '_'
			}
		}
	}
	return string(b)
}

// Load returns the module's contents as the kernel loads it, unpacked if the
// file is compressed (gzip, xz or zstd).
func (f ModuleFile) Load() ([]byte, error) {
	return loadModule(f.Path)
}

func loadModule(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("kernel module: %w", err)
	}
	defer file.Close()
	b, err := unpack.ReadLimited(file, maxModule)
	if err != nil {
		return nil, fmt.Errorf("kernel module %s: %w", path, err)
	}
	if c, ok := unpack.Find(b); ok {
		if b, err = c.Unpack(b, maxModule); err != nil {
			return nil, fmt.Errorf("kernel module %s is a damaged %s file: %w", path, c.Name, err)
		}
	}
	if !bytes.HasPrefix(b, []byte(elf.ELFMAG)) {
		return nil, fmt.Errorf("kernel module %s is not an ELF file", path)
	}
	return b, nil
}

// readModuleInfo reads the .modinfo section. A module that is not compressed
// is not read as a whole.
func readModuleInfo(path string) (moduleInfo, error) {
	if !strings.HasSuffix(path, ".ko") {
		b, err := loadModule(path)
		if err != nil {
			return moduleInfo{}, err
		}
		return parseModuleInfo(path, bytes.NewReader(b))
	}
	f, err := os.Open(path)
	if err != nil {
		return moduleInfo{}, fmt.Errorf("kernel module: %w", err)
	}
	defer f.Close()
	return parseModuleInfo(path, f)
}

func parseModuleInfo(path string, r io.ReaderAt) (moduleInfo, error) {
	e, err := elf.NewFile(r)
	if err != nil {
		return moduleInfo{}, fmt.Errorf("kernel module %s is not an ELF file: %w", path, err)
	}
	s := e.Section(".modinfo")
	if s == nil || s.Type != elf.SHT_PROGBITS {
		return moduleInfo{}, fmt.Errorf("kernel module %s has no .modinfo section", path)
	}
	b, err := unpack.ReadLimited(s.Open(), 1<<20)
	if err != nil {
		return moduleInfo{}, fmt.Errorf("kernel module %s: .modinfo: %w", path, err)
	}
	var info moduleInfo
	for field := range bytes.SplitSeq(b, []byte{0}) {
		key, value, _ := strings.Cut(string(field), "=")
		switch key {
		case "depends":
			for d := range strings.SplitSeq(value, ",") {
				if d != "" {
					info.depends = append(info.depends, Underscores(d))
				}
			}
		case "alias":
			info.aliases = append(info.aliases, value)
		case "softdep":
			info.softdeps = info.softdeps.add(value)
		case "vermagic":
			info.vermagic = value
		}
	}
	return info, nil
}
