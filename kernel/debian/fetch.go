package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

var (
	// ErrName says that there is no kernel of the name.
	ErrName = errors.New("no such kernel")
	// ErrApt says that this machine's apt, or a tool beside it, cannot fetch.
	ErrApt = errors.New("apt cannot fetch it")
)

// suites are where the series are.
var suites = map[string]string{"5.10": "bullseye", "6.1": "bookworm", "6.12": "bookworm-backports"}

const cloud = "-cloud"

// Names are the names that Fetch knows.
func Names() []string {
	out := []string{"current"}
	for s := range suites {
		out = append(out, s, s+cloud)
	}
	slices.Sort(out)
	return out
}

// Fetch returns the path of the vmlinuz of a kernel, its modules beside it, from
// the cache or, the first time, from the mirror; progress is then told what is
// being done. Several processes may fetch the same one at once. An error leaves
// nothing behind.
func Fetch(ctx context.Context, cache, name string, progress func(what string)) (vmlinuz string, err error) {
	if !slices.Contains(Names(), name) {
		return "", fmt.Errorf("kernel debian:%s: %w; there are %s", name, ErrName, strings.Join(Names(), ", "))
	}
	link := filepath.Join(cache, "kernel", name)
	if vmlinuz := kernelIn(link); vmlinuz != "" {
		return vmlinuz, nil
	}
	if err := os.MkdirAll(filepath.Join(cache, "kernel"), 0o777); err != nil {
		return "", fmt.Errorf("the cache of kernels: %w", err)
	}
	tmp, err := os.MkdirTemp(filepath.Join(cache, "kernel"), ".new.")
	if err != nil {
		return "", fmt.Errorf("the cache of kernels: %w", err)
	}
	defer os.RemoveAll(tmp)
	f := &fetcher{name: name, tmp: tmp}
	if progress == nil {
		progress = func(string) {}
	}
	if err := f.fetch(ctx, progress); err != nil {
		return "", fmt.Errorf("kernel debian:%s: %w", name, err)
	}
	return f.publish(cache, link)
}

// kernelIn is the only kernel in a folder; empty if there is none.
func kernelIn(dir string) string {
	found, err := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*")) // the pattern is good
	if err != nil || len(found) != 1 {
		return ""
	}
	return found[0]
}

// fetcher fetches one kernel into a folder of its own.
type fetcher struct {
	name    string
	tmp     string
	options []string // of apt
	release string
}

func (f *fetcher) root() string { return filepath.Join(f.tmp, "root") }

func (f *fetcher) fetch(ctx context.Context, progress func(string)) error {
	meta := "linux-image-amd64"
	if series, isCloud := strings.CutSuffix(f.name, cloud); f.name != "current" {
		if isCloud {
			meta = "linux-image-cloud-amd64"
		}
		progress("reading the index of Debian's suite " + suites[series])
		if err := f.useSuite(ctx, suites[series]); err != nil {
			return err
		}
	}
	pkg, err := f.packageOf(ctx, meta)
	if err != nil {
		return err
	}
	progress("fetching " + pkg)
	if _, err := f.run(ctx, "apt-get", append(slices.Clone(f.options), "download", "-qq", pkg)...); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(f.tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("%w: it downloaded %d packages for %s", ErrApt, len(debs), pkg)
	}
	progress("unpacking " + pkg)
	if err := os.Mkdir(f.root(), 0o755); err != nil {
		return err
	}
	if _, err := f.run(ctx, "dpkg", "-x", debs[0], f.root()); err != nil {
		return err
	}
	vmlinuz := kernelIn(f.root())
	if vmlinuz == "" {
		return fmt.Errorf("%w: package %s has no kernel", ErrApt, pkg)
	}
	f.release = strings.TrimPrefix(filepath.Base(vmlinuz), "vmlinuz-")
	// A package has no modules.dep; without one each start would look into
	// every module.
	_, err = f.run(ctx, "depmod", "-b", f.root(), f.release)
	return errors.Join(err, os.Chmod(f.root(), 0o755))
}

// packageOf is the package that a metapackage stands for.
func (f *fetcher) packageOf(ctx context.Context, meta string) (string, error) {
	out, err := f.run(ctx, "apt-cache", append(slices.Clone(f.options), "depends", meta)...)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(out)) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: ")
		if ok && strings.HasPrefix(name, "linux-image-") && !strings.ContainsAny(name, " /") {
			return name, nil
		}
	}
	return "", fmt.Errorf("%w: it knows no %s; check this machine's apt sources, and run apt-get update", ErrApt, meta)
}

// useSuite gives apt a state of its own with another suite of the mirror that
// this machine uses: its sources stay as they are.
func (f *fetcher) useSuite(ctx context.Context, suite string) error {
	out, err := f.run(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI) $(COMPONENT) $(CREATED_BY) $(CODENAME)")
	if err != nil {
		return err
	}
	mirror := ""
	for line := range strings.Lines(string(out)) {
		w := strings.Fields(line)
		if len(w) == 4 && w[1] == "main" && w[2] == "Packages" && !strings.Contains(w[3], "-") {
			mirror = w[0]
			break
		}
	}
	if mirror == "" {
		return fmt.Errorf("%w: it has no source of Debian's main component to fetch %s from; check its sources, and run apt-get update", ErrApt, suite)
	}
	state := filepath.Join(f.tmp, "apt")
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(state, d), 0o755); err != nil {
			return err
		}
	}
	list := filepath.Join(state, "sources.list")
	source := "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] " + mirror + " " + suite + " main\n"
	if err := os.WriteFile(list, []byte(source), 0o644); err != nil {
		return err
	}
	f.options = []string{
		"-o", "Dir::State::lists=" + filepath.Join(state, "lists"), "-o", "Dir::Cache=" + filepath.Join(state, "cache"),
		"-o", "Dir::Etc::sourcelist=" + list, "-o", "Dir::Etc::sourceparts=/dev/null",
		"-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false", "-o", "Acquire::Check-Valid-Until=false",
	}
	if os.Getuid() == 0 { // else apt's own user could not write there
		f.options = append(f.options, "-o", "APT::Sandbox::User=root")
	}
	_, err = f.run(ctx, "apt-get", append(slices.Clone(f.options), "update", "-qq")...)
	return err
}

// run runs a tool in the folder.
func (f *fetcher) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		// Not in everybody's path.
		if path = "/sbin/" + name; !executable(path) {
			return nil, fmt.Errorf("%w: there is no %s here; on a machine without apt, unpack a linux-image package and name its vmlinuz", ErrApt, name)
		}
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = f.tmp
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("%w: %s: %w: %s", ErrApt, name, err, lastLine(stderr.String()))
	}
	return stdout.Bytes(), nil
}

func executable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

// publish moves what was unpacked into its place. If somebody else was faster,
// his is used.
func (f *fetcher) publish(cache, link string) (string, error) {
	dir := filepath.Join(cache, "kernel", f.release)
	if err := os.Rename(f.root(), dir); err != nil && kernelIn(dir) == "" {
		return "", fmt.Errorf("the cache of kernels: %w", err)
	}
	next := filepath.Join(f.tmp, "link")
	if err := os.Symlink(f.release, next); err != nil {
		return "", err
	}
	if err := os.Rename(next, link); err != nil {
		return "", fmt.Errorf("the cache of kernels: %w", err)
	}
	if vmlinuz := kernelIn(link); vmlinuz != "" {
		return vmlinuz, nil
	}
	return "", fmt.Errorf("the cache of kernels: %s: %w", link, fs.ErrNotExist)
}
