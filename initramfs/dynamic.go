package initramfs

import (
	"debug/elf"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// LibraryFiles are the dynamic loader of a program and the libraries that the
// loader says it needs, as files of an initramfs under the names the program
// uses. A static program has none.
func LibraryFiles(program string) ([]File, error) {
	f, err := elf.Open(program)
	if err != nil {
		return nil, nil // not ELF: CheckStatic has looked at it
	}
	defer f.Close()
	loader := ""
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b := make([]byte, p.Filesz)
			if _, err := p.ReadAt(b, 0); err != nil {
				return nil, err
			}
			loader = strings.TrimRight(string(b), "\x00")
		}
	}
	if loader == "" {
		return nil, nil
	}
	path, err := filepath.Abs(program)
	if err != nil {
		return nil, err
	}
	// What ldd(1) does; both glibc's and musl's loaders know it.
	out, err := exec.Command(loader, "--list", path).Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list %s: %w (%w; building with CGO_ENABLED=0 avoids libraries)", loader, path, err, ErrNotStatic)
	}
	names := map[string]bool{loader: true}
	for line := range strings.Lines(string(out)) {
		// name => /path (0x…), or /path (0x…)
		words := strings.Fields(line)
		if i := len(words) - 2; i >= 0 && strings.HasPrefix(words[i], "/") {
			names[words[i]] = true
		} else if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("%s: the library %s is not on this machine", program, words[0])
		}
	}
	var files []File
	for _, name := range slices.Sorted(maps.Keys(names)) {
		host, err := filepath.EvalSymlinks(name)
		if err != nil {
			return nil, err
		}
		files = append(files, File{Name: name, Mode: 0o755, HostPath: host})
	}
	return files, nil
}
