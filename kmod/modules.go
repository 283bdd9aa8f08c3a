// Package kmod finds the kernel modules that a guest needs, with their
// dependencies, aliases and softdeps, in load order, and unpacks them. Module
// files are not trusted: damage costs an error.
package kmod

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moovm/moovm/kernel"
)

// ErrNoModules says that there is no modules folder for a kernel.
var ErrNoModules = errors.New("no kernel modules found")

// ErrUnknownModule says that a module is neither in the modules folder nor
// built into the kernel.
var ErrUnknownModule = errors.New("unknown kernel module")

// Modules is a kernel's modules folder (lib/modules/RELEASE), with what
// depmod and the kernel's build wrote about it. A folder without modules.dep,
// as in a package that was unpacked but not installed, does as well:
// dependencies are then read from the modules. It is safe for concurrent use.
type Modules struct {
	dir string

	mu       sync.Mutex
	files    map[string]string         // module name → path below dir
	deps     map[string][]string       // from modules.dep: direct and indirect, as names
	infos    map[string]moduleInfo     // read from the modules themselves
	builtin  map[string]bool           // names and aliases built into the kernel
	aliases  []moduleAlias             // of modules.alias, once read
	scanned  map[string]bool           // folders whose modules were asked for their aliases
	softdeps map[string]moduleSoftdeps // of modules.softdep
	have     struct{ dep, alias, softdep bool }
}

type moduleAlias struct{ pattern, module string }

type moduleSoftdeps struct{ pre, post []string }

// ModuleFile is one module, ready to be loaded after those before it.
type ModuleFile struct {
	Name string // with underscores, as lsmod prints it
	Path string // on the host
	// Optional modules were asked for by others as an addition (a softdep):
	// that they cannot be loaded, because the hardware lacks something for
	// example, is no failure.
	Optional bool
}

// OpenModules opens the modules folder of a kernel release. dir is the folder
// itself or one it is in: lib/modules, or the root of an unpacked package or
// of a system. An empty release accepts the only one there is.
func OpenModules(dir, release string) (*Modules, error) {
	st, err := os.Stat(dir)
	if err != nil {
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
			err = pe.Err // the message has the path already
		}
		return nil, fmt.Errorf("modules folder %s: %w; name the folder lib/modules/RELEASE of the kernel's package (%w)", dir, err, ErrNoModules)
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("modules folder %s is a file; name the folder lib/modules/RELEASE of the kernel's package: %w", dir, ErrNoModules)
	}
	var others []string
	for _, parent := range []string{".", "lib/modules", "usr/lib/modules"} {
		parent := filepath.Join(dir, parent)
		if release != "" {
			if d := filepath.Join(parent, release); isModulesDir(d) {
				return newModules(d)
			}
		}
		entries, _ := os.ReadDir(parent)
		for _, e := range entries {
			if isModulesDir(filepath.Join(parent, e.Name())) {
				others = append(others, filepath.Join(parent, e.Name()))
			}
		}
	}
	if isModulesDir(dir) {
		m, err := newModules(dir)
		if err != nil {
			return nil, err
		}
		if r := m.release(); release != "" && r != "" && r != release {
			return nil, fmt.Errorf("modules folder %s is for kernel %s, but the kernel is %s: %w", dir, r, release, ErrNoModules)
		}
		return m, nil
	}
	switch {
	case release == "" && len(others) == 1:
		return newModules(others[0])
	case release == "" && len(others) > 1:
		return nil, fmt.Errorf("modules folder %s has several kernels' modules; name one of %s: %w", dir, strings.Join(others, ", "), ErrNoModules)
	case len(others) > 0:
		for i := range others {
			others[i] = filepath.Base(others[i])
		}
		return nil, fmt.Errorf("modules folder %s has none for kernel %s (only %s): %w", dir, release, strings.Join(others, ", "), ErrNoModules)
	case release != "":
		return nil, fmt.Errorf("modules folder %s has none for kernel %s: %w", dir, release, ErrNoModules)
	}
	return nil, fmt.Errorf("folder %s has no kernel modules in it: %w", dir, ErrNoModules)
}

// FindModules looks for the modules of k where they usually are: next to the
// kernel in an unpacked package (boot/vmlinuz beside lib/modules), in a build
// tree's or a distribution's lib/modules, in this system's /lib/modules.
func FindModules(k *kernel.Kernel) (*Modules, error) {
	if k.Release == "" {
		return nil, fmt.Errorf("kernel %s does not say its release; name its modules folder: %w", k.Path, ErrNoModules)
	}
	at := filepath.Dir(k.Path)
	if abs, err := filepath.Abs(at); err == nil {
		at = abs
	}
	tried := []string{filepath.Dir(at), at, "/"}
	for _, root := range tried {
		for _, lib := range []string{"lib/modules", "usr/lib/modules"} {
			if d := filepath.Join(root, lib, k.Release); isModulesDir(d) {
				return newModules(d)
			}
		}
	}
	// vmlinuz beside its modules, as in /usr/lib/modules/RELEASE/vmlinuz.
	if filepath.Base(at) == k.Release && isModulesDir(at) {
		return newModules(at)
	}
	return nil, fmt.Errorf("kernel %s: no folder lib/modules/%s beside it or in /; name its modules folder: %w", k.Path, k.Release, ErrNoModules)
}

// isModulesDir says whether dir looks like lib/modules/RELEASE.
func isModulesDir(dir string) bool {
	for _, n := range []string{"modules.dep", "modules.order", "modules.builtin", "kernel"} {
		if _, err := os.Stat(filepath.Join(dir, n)); err == nil {
			return true
		}
	}
	ko, _ := filepath.Glob(filepath.Join(dir, "*.ko*"))
	return len(ko) > 0
}

func newModules(dir string) (*Modules, error) {
	m := &Modules{
		dir:      dir,
		files:    map[string]string{},
		deps:     map[string][]string{},
		infos:    map[string]moduleInfo{},
		builtin:  map[string]bool{},
		scanned:  map[string]bool{},
		softdeps: map[string]moduleSoftdeps{},
	}
	var err error
	if m.have.dep, err = m.lines("modules.dep", m.addDep); err != nil {
		return nil, err
	}
	if !m.have.dep || len(m.files) == 0 {
		m.have.dep = false
		if err := m.walk(); err != nil {
			return nil, err
		}
	}
	if _, err := m.lines("modules.builtin", func(line string) {
		m.builtin[ModuleName(line)] = true
	}); err != nil {
		return nil, err
	}
	if err := m.readBuiltinInfo(); err != nil {
		return nil, err
	}
	if m.have.softdep, err = m.lines("modules.softdep", m.addSoftdep); err != nil {
		return nil, err
	}
	m.have.softdep = m.have.softdep && m.have.dep
	return m, nil
}

// Dir is the modules folder.
func (m *Modules) Dir() string { return m.dir }

// release is the kernel the modules were built for, judged by one of them.
func (m *Modules) release() string {
	names := make([]string, 0, len(m.files))
	for n := range m.files {
		names = append(names, n)
	}
	if len(names) == 0 {
		return ""
	}
	info, err := m.info(slices.Min(names))
	if err != nil {
		return ""
	}
	r, _, _ := strings.Cut(info.vermagic, " ")
	return r
}

// lines calls f for each line of a file of the folder that is neither empty
// nor a comment, and says whether the file is there.
func (m *Modules) lines(name string, f func(line string)) (bool, error) {
	b, err := os.ReadFile(filepath.Join(m.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("modules folder %s: %w", m.dir, err)
	}
	s := bufio.NewScanner(bytes.NewReader(b))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if line := strings.TrimSpace(s.Text()); line != "" && line[0] != '#' {
			f(line)
		}
	}
	if err := s.Err(); err != nil {
		return true, fmt.Errorf("modules folder %s: %s: %w", m.dir, name, err)
	}
	return true, nil
}

func (m *Modules) addDep(line string) {
	file, rest, ok := strings.Cut(line, ":")
	if !ok || !filepath.IsLocal(file) {
		return // what lies elsewhere is not this kernel's
	}
	name := ModuleName(file)
	m.files[name] = file
	var deps []string
	for _, d := range strings.Fields(rest) {
		deps = append(deps, ModuleName(d))
	}
	m.deps[name] = deps
}

func (m *Modules) addSoftdep(line string) {
	word, rest, _ := strings.Cut(line, " ")
	name, rest, _ := strings.Cut(rest, " ")
	if word == "softdep" {
		m.softdeps[ModuleName(name)] = m.softdeps[ModuleName(name)].add(rest)
	}
}

// add parses the value of a softdep: "pre: a b post: c".
func (s moduleSoftdeps) add(value string) moduleSoftdeps {
	var to *[]string
	for _, w := range strings.Fields(value) {
		switch {
		case w == "pre:":
			to = &s.pre
		case w == "post:":
			to = &s.post
		case to != nil:
			*to = append(*to, w)
		}
	}
	return s
}

// readBuiltinInfo reads modules.builtin.modinfo: NUL-terminated strings
// "module.key=value" of the modules that are built in.
func (m *Modules) readBuiltinInfo() error {
	b, err := os.ReadFile(filepath.Join(m.dir, "modules.builtin.modinfo"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("modules folder %s: %w", m.dir, err)
	}
	for s := range bytes.SplitSeq(b, []byte{0}) {
		if key, value, ok := strings.Cut(string(s), "="); ok && strings.HasSuffix(key, ".alias") {
			m.builtin[Underscores(value)] = true
		}
	}
	return nil
}

// walk finds the modules when there is no modules.dep.
func (m *Modules) walk() error {
	err := filepath.WalkDir(m.dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "build" || d.Name() == "source") {
			return fs.SkipDir
		}
		if d.Type().IsRegular() && isModuleFile(p) {
			rel, err := filepath.Rel(m.dir, p)
			if err != nil {
				return err
			}
			m.files[ModuleName(p)] = rel
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("modules folder %s: %w", m.dir, err)
	}
	return nil
}

// Has says whether name, a module or an alias, is there or built in.
func (m *Modules) Has(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	found, builtin, err := m.lookup(name)
	return err == nil && (builtin || len(found) > 0)
}

// Resolve returns the files of the named modules and of everything they
// depend on, in load order, each once. Names may be written with - or _ and
// may be aliases (fs-ext4). What is built into the kernel is left out. A name
// that is unknown is an error that matches ErrUnknownModule.
func (m *Modules) Resolve(names ...string) ([]ModuleFile, error) {
	return m.resolve(names, false)
}

// ResolveOptional is Resolve, but leaves out names that are unknown.
func (m *Modules) ResolveOptional(names ...string) ([]ModuleFile, error) {
	return m.resolve(names, true)
}

// MergeModules joins results of Resolve; a module that occurs again is left
// out, and is optional only if it is so everywhere.
func MergeModules(lists ...[]ModuleFile) []ModuleFile {
	var out []ModuleFile
	at := map[string]int{}
	for _, l := range lists {
		for _, f := range l {
			if i, ok := at[f.Name]; ok {
				out[i].Optional = out[i].Optional && f.Optional
				continue
			}
			at[f.Name] = len(out)
			out = append(out, f)
		}
	}
	return out
}

func (m *Modules) resolve(names []string, optional bool) ([]ModuleFile, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := resolver{m: m, at: map[string]int{}, open: map[string]bool{}}
	for _, n := range names {
		err := r.want(n, optional)
		if errors.Is(err, ErrUnknownModule) && optional {
			continue
		}
		if err != nil {
			return nil, err
		}
	}
	return r.out, nil
}

// A resolver collects modules depth first, so that each comes after what it
// needs.
type resolver struct {
	m    *Modules
	out  []ModuleFile
	at   map[string]int  // index in out
	open map[string]bool // being visited: ends circles
}

// want adds whatever name stands for.
func (r *resolver) want(name string, optional bool) error {
	found, builtin, err := r.m.lookup(name)
	if err != nil {
		return err
	}
	if builtin {
		return nil
	}
	if len(found) == 0 {
		meant := ""
		if !optional {
			if near := r.m.near(name); len(near) > 0 {
				meant = "; near names: " + strings.Join(near, ", ")
			}
		}
		return fmt.Errorf("module %s is not in %s and not built into the kernel%s: %w", name, r.m.dir, meant, ErrUnknownModule)
	}
	// Several modules may serve one alias: implementations of an algorithm,
	// say. One of them has to do, which one depends on the hardware.
	optional = optional || len(found) > 1
	for _, f := range found {
		if err := r.visit(f, optional); err != nil {
			return err
		}
	}
	return nil
}

func (r *resolver) visit(name string, optional bool) error {
	if i, ok := r.at[name]; ok {
		if r.out[i].Optional && !optional {
			r.out[i].Optional = false
			return r.mustHave(name)
		}
		return nil
	}
	if r.open[name] || r.m.builtin[name] {
		return nil
	}
	r.open[name] = true
	defer delete(r.open, name)

	soft, err := r.m.softdepsOf(name)
	if err != nil {
		return err
	}
	deps, err := r.m.depsOf(name)
	if err != nil {
		return err
	}
	for _, s := range soft.pre {
		if err := r.want(s, true); err != nil && !errors.Is(err, ErrUnknownModule) {
			return err
		}
	}
	for _, d := range deps {
		if r.m.files[d] == "" && !r.m.builtin[d] {
			return fmt.Errorf("module %s needs %s, which is not in %s: %w", name, d, r.m.dir, ErrUnknownModule)
		}
		if err := r.visit(d, optional); err != nil {
			return err
		}
	}
	r.at[name] = len(r.out)
	r.out = append(r.out, ModuleFile{Name: name, Path: filepath.Join(r.m.dir, r.m.files[name]), Optional: optional})
	for _, s := range soft.post {
		if err := r.want(s, true); err != nil && !errors.Is(err, ErrUnknownModule) {
			return err
		}
	}
	return nil
}

// mustHave makes what name depends on as necessary as name has become.
func (r *resolver) mustHave(name string) error {
	deps, err := r.m.depsOf(name)
	if err != nil {
		return err
	}
	for _, d := range deps {
		if err := r.visit(d, false); err != nil {
			return err
		}
	}
	return nil
}

// lookup finds the modules that a name or alias stands for.
func (m *Modules) lookup(name string) (found []string, builtin bool, err error) {
	n := Underscores(name)
	if m.files[n] != "" {
		return []string{n}, false, nil
	}
	if m.builtin[n] {
		return nil, true, nil
	}
	if err := m.readAliases(n); err != nil {
		return nil, false, err
	}
	for _, a := range m.aliases {
		if ok, _ := path.Match(a.pattern, n); ok && m.files[a.module] != "" && !slices.Contains(found, a.module) {
			found = append(found, a.module)
		}
	}
	slices.Sort(found)
	return found, false, nil
}

// readAliases fills m.aliases, from modules.alias or else from the modules
// that may have the alias.
func (m *Modules) readAliases(alias string) error {
	if m.have.dep && !m.have.alias {
		var err error
		m.have.alias, err = m.lines("modules.alias", func(line string) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "alias" {
				m.aliases = append(m.aliases, moduleAlias{Underscores(f[1]), Underscores(f[2])})
			}
		})
		if err != nil {
			return err
		}
	}
	if m.have.alias {
		return nil
	}
	// Opening every module is slow, so look only where such aliases are.
	folder := ""
	for prefix, f := range map[string]string{"crypto_": "/crypto/", "fs_": "/fs/"} {
		if strings.HasPrefix(alias, prefix) {
			folder = f
		}
	}
	if m.scanned[folder] {
		return nil
	}
	m.scanned[folder] = true
	for name, file := range m.files {
		if !strings.Contains("/"+filepath.ToSlash(file), folder) {
			continue
		}
		info, err := m.info(name)
		if err != nil {
			continue // not the one that was asked for, so no reason to stop
		}
		for _, a := range info.aliases {
			m.aliases = append(m.aliases, moduleAlias{Underscores(a), name})
		}
	}
	return nil
}

func (m *Modules) depsOf(name string) ([]string, error) {
	if m.have.dep {
		// modules.dep names them the other way round: needed first is last.
		deps := slices.Clone(m.deps[name])
		slices.Reverse(deps)
		return deps, nil
	}
	info, err := m.info(name)
	return info.depends, err
}

func (m *Modules) softdepsOf(name string) (moduleSoftdeps, error) {
	if m.have.softdep {
		return m.softdeps[name], nil
	}
	info, err := m.info(name)
	return info.softdeps, err
}

// info reads the .modinfo section of a module, once.
func (m *Modules) info(name string) (moduleInfo, error) {
	if i, ok := m.infos[name]; ok {
		return i, nil
	}
	i, err := readModuleInfo(filepath.Join(m.dir, m.files[name]))
	if err != nil {
		return moduleInfo{}, err
	}
	m.infos[name] = i
	return i, nil
}
