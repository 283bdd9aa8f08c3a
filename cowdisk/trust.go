package cowdisk

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
)

// maxLinks is how many symlinks a path may lead through: as many as the kernel follows.
const maxLinks = 40

// walker goes where the kernel would go with a path that a header names, and looks at nothing that its image may not name: on the way
// there might be an automount, a tape, or a file whose existence is nobody's business. It may look below the roots. The folders above them,
// and what lies on the way to what the user named, are known; nothing else is touched.
type walker struct {
	fs    FS
	roots []string // real
	named []string // what the user named: he had us look at all on the way there
	known map[string]string
}

// walker for the path in l's header.
func (op *opener) walker(l *layer) *walker {
	w := &walker{fs: op.o.fs(), roots: []string{filepath.Dir(l.real)}}
	for _, r := range op.o.BackingRoots {
		if real, err := w.fs.Resolve(r); err == nil { // a folder that does not exist allows nothing
			w.roots = append(w.roots, real)
		}
	}
	for _, u := range op.layers {
		if u.named {
			w.named = append(w.named, u.path)
		}
	}
	w.named = append(w.named, op.o.BackingRoots...)
	return w
}

// inside reports whether path, which has no symlinks, is root or lies in it.
func inside(root, path string) (rel string, ok bool) {
	rel, err := filepath.Rel(root, path)
	return rel, err == nil && filepath.IsLocal(rel)
}

// outside is the error of a path that leads to what may not be looked at.
type outside struct{ at string }

func (o *outside) Error() string { return o.at + " " + ErrBackingOutside.Error() }
func (o *outside) Unwrap() error { return ErrBackingOutside }

// walk says where path leads, and the root that this lies in. The last element need not exist.
func (w *walker) walk(path string) (real, root, rel string, err error) {
	if real, err = w.follow(path, w.look); err != nil {
		return "", "", "", err
	}
	for _, r := range w.roots {
		if rel, ok := inside(r, real); ok {
			return real, r, rel, nil
		}
	}
	return "", "", "", &outside{real}
}

// follow takes an absolute path step by step. look says what is at a place whose folder is real.
func (w *walker) follow(path string, look func(at string) (target string, dir bool, err error)) (string, error) {
	cur, todo, links := "/", strings.Split(path, "/"), 0
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			cur = filepath.Dir(cur)
			continue
		}
		at := filepath.Join(cur, name)
		target, dir, err := look(at)
		switch {
		case errors.Is(err, ErrBackingOutside):
			return "", &outside{strings.Join(append([]string{at}, todo...), "/")}
		case errors.Is(err, fs.ErrNotExist) && len(todo) == 0:
			return at, nil
		case err != nil:
			return "", err
		case target == "" && !dir && len(todo) > 0:
			return "", &fs.PathError{Op: "open", Path: at, Err: errors.New("not a directory")}
		case target == "":
			cur = at
			continue
		}
		if links++; links > maxLinks {
			return "", &fs.PathError{Op: "open", Path: path, Err: errors.New("too many levels of symbolic links")}
		}
		if filepath.IsAbs(target) {
			cur = "/"
		}
		todo = append(strings.Split(target, "/"), todo...)
	}
	return cur, nil
}

// look looks where that is allowed.
func (w *walker) look(at string) (target string, dir bool, err error) {
	for _, r := range w.roots {
		if _, ok := inside(at, r); ok { // r is real, so all above it is
			return "", true, nil
		}
		if rel, ok := inside(r, at); ok {
			return w.fs.LookBeneath(r, rel)
		}
	}
	if w.known == nil {
		w.learn()
	}
	if target, ok := w.known[at]; ok {
		return target, target == "", nil
	}
	return "", false, ErrBackingOutside
}

// learn goes the ways that the user named.
func (w *walker) learn() {
	w.known = map[string]string{}
	wd, err := w.fs.Resolve(".")
	if err != nil {
		return
	}
	for _, path := range w.named {
		if !filepath.IsAbs(path) {
			path = wd + "/" + path
		}
		_, _ = w.follow(path, func(at string) (string, bool, error) { // as far as it leads
			target, dir, err := w.fs.LookBeneath("/", strings.TrimPrefix(at, "/"))
			if err == nil && (dir || target != "") {
				w.known[at] = target
			}
			return target, dir, err
		})
	}
}

// outsideError refuses the backing file of l, whose header names path.
func outsideError(l *layer, path string, err error) error {
	detail, at := path, path
	if o := (*outside)(nil); errors.As(err, &o) {
		if at = o.at; at != path {
			detail += ", which is " + at
		}
	}
	dir := at[:max(1, strings.LastIndexByte(at, '/'))] // by its text: what is in it was not looked at
	return &Error{Path: l.path, Field: "backing file", Kind: ErrBackingOutside, Detail: detail, Remedy: fmt.Sprintf("if you trust this image, allow backing files in %s", dir)}
}
