package delta

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/moovm/moovm/cowdisk"
)

var (
	// ErrBase says that a stream stands on something else than the base.
	ErrBase = errors.New("the stream stands on another base")
	// ErrResume says that a stream is not the rest of what was begun.
	ErrResume = errors.New("it is not the rest of what was begun")
)

// ImportOptions say what becomes of a stream.
type ImportOptions struct {
	// Options open the base.
	cowdisk.Options
	// Base is what the new image stands on, as its header is to name it; empty
	// for a stream that stands on nothing.
	Base string
	// BaseFormat says what it is.
	BaseFormat cowdisk.Format
	// Resume goes on with what an import that was cut off has left.
	Resume bool
	// Progress is told how many bytes of the disk are there; may be nil.
	Progress func(done, total int64)
}

// CutError is a stream that did not arrive whole; it wraps the reason. What
// there is is kept, to be resumed.
type CutError struct {
	// Pieces are on disk: the rest is a stream from there.
	Pieces int64
	Path   string // where it is kept
	Err    error  // ErrCut, ErrStream, or the context's
}

// Error implements error.
func (e *CutError) Error() string {
	return fmt.Sprintf("%v; the first %d pieces are kept in %s", e.Err, e.Pieces, e.Path)
}

// Unwrap is the reason.
func (e *CutError) Unwrap() error { return e.Err }

// saveEvery is after how many bytes of the disk what there is is put on disk.
const saveEvery = 256 << 20

// state is what is known of an import that is not finished, in the file beside
// it.
type state struct {
	Header Header `json:"header"`
	Base   string `json:"base,omitempty"`
	Pieces int64  `json:"pieces"`
}

func partial(out string) (image, states string) { return out + ".partial", out + ".partial.state" }

// Begun tells how many pieces an import that was cut off has on disk.
func Begun(out string) (pieces int64, err error) {
	s, err := readState(out)
	return s.Pieces, err
}

func readState(out string) (s state, err error) {
	_, path := partial(out)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("%s: nothing was begun there: %w", out, err)
	}
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("%s: %w; remove it, and begin again", path, err)
	}
	return s, nil
}

// Import makes a new image at out of a stream. Until it is whole it is under
// another name. After an error it stays there, to be resumed, if the stream was
// cut off or damaged or ctx ended (a *CutError), and nothing is left otherwise.
func Import(ctx context.Context, r io.Reader, out string, o ImportOptions) (err error) {
	in, err := newReader(r)
	if err != nil {
		return err
	}
	defer in.close()
	switch {
	case in.Base != "" && o.Base == "":
		return fmt.Errorf("%w: it stands on a disk with digest %.16s…; name that", ErrBase, in.Base)
	case in.Base == "" && o.Base != "":
		return fmt.Errorf("%w: it stands on nothing; name no base", ErrBase)
	}
	if _, err := os.Lstat(out); err == nil {
		return &cowdisk.Error{Path: out, Kind: cowdisk.ErrExists, Remedy: "remove it first, or choose another name"}
	}
	i := &importer{in: in, out: out, o: o}
	i.image, i.states = partial(out)
	if err := i.begin(ctx); err != nil {
		return err
	}
	err = i.copy(ctx)
	switch {
	case err == nil:
		return i.publish()
	case errors.Is(err, ErrCut), errors.Is(err, ErrStream), ctx.Err() != nil:
		if serr := i.save(); serr != nil {
			return errors.Join(err, serr, i.drop())
		}
		return errors.Join(&CutError{i.state.Pieces, i.image, err}, i.disk.Close())
	}
	return errors.Join(err, i.drop())
}

// importer is an import under way.
type importer struct {
	in            *reader
	out           string
	o             ImportOptions
	image, states string
	disk          *cowdisk.Disk
	state         state
	unsaved       int64 // bytes
}

// begin makes the image, or opens the one that was begun.
func (i *importer) begin(ctx context.Context) (err error) {
	h := i.in.Header
	h.From = 0
	i.state = state{Header: h, Base: i.o.Base}
	if i.o.Resume {
		if i.state, err = readState(i.out); err != nil {
			return err
		}
		switch {
		case i.state.Header != h || i.state.Base != i.o.Base:
			return fmt.Errorf("%s: %w: image, base or options differ; remove it, and begin again", i.image, ErrResume)
		case i.in.From > i.state.Pieces:
			return fmt.Errorf("%s: %w: it has %d pieces, the stream begins with piece %d", i.image, ErrResume, i.state.Pieces, i.in.From)
		}
	} else {
		if i.in.From > 0 {
			return fmt.Errorf("%w: the stream begins with piece %d", ErrResume, i.in.From)
		}
		if err := i.checkBase(ctx); err != nil {
			return err
		}
		if err := i.create(); err != nil {
			return err
		}
	}
	opened := i.o.Options
	opened.Format = cowdisk.FormatCOW
	if i.disk, err = cowdisk.Open(i.image, opened); err != nil {
		if !i.o.Resume {
			os.Remove(i.image)
		}
		return err
	}
	return nil
}

// checkBase compares the base's contents with what the stream stands on.
func (i *importer) checkBase(ctx context.Context) error {
	if i.o.Base == "" {
		return nil
	}
	path := i.o.Base
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(i.out), path)
	}
	o := i.o.Options
	o.ReadOnly, o.Format = true, i.o.BaseFormat
	base, err := cowdisk.OpenAny(path, o)
	if err != nil {
		return err
	}
	defer base.Close()
	digest, err := Digest(ctx, base, i.o.Progress)
	if err != nil {
		return err
	}
	if digest != i.in.Base {
		return fmt.Errorf("%s: %w: it has digest %.16s…, the stream wants %.16s…", path, ErrBase, digest, i.in.Base)
	}
	return nil
}

func (i *importer) create() error {
	if _, err := os.Lstat(i.image); err == nil {
		return &cowdisk.Error{Path: i.image, Kind: cowdisk.ErrExists, Detail: "an import was cut off here", Remedy: "resume it, or remove it with the .state file beside it"}
	}
	return cowdisk.Create(i.image, cowdisk.CreateOptions{Size: i.in.Size, Backing: i.o.Base, BackingFormat: i.o.BaseFormat,
		BackingRoots: i.o.BackingRoots, AllowStaleBacking: i.o.AllowStaleBacking})
}

// copy puts the stream's pieces into the image.
func (i *importer) copy(ctx context.Context) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p, contents, err := i.in.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if i.in.count <= i.state.Pieces {
			continue // it is there
		}
		if p.kind == zero {
			err = i.disk.WriteZeroes(p.offset, p.length, false)
		} else {
			_, err = i.disk.WriteAt(contents, p.offset)
		}
		if err != nil {
			return err
		}
		if i.o.Progress != nil {
			i.o.Progress(i.in.at, i.in.Size)
		}
		if i.unsaved += p.length; i.unsaved >= saveEvery {
			if err := i.save(); err != nil {
				return err
			}
		}
	}
}

// save puts what there is on disk, and then how much it is.
func (i *importer) save() error {
	if err := i.disk.Flush(); err != nil {
		return err
	}
	i.unsaved, i.state.Pieces = 0, max(i.state.Pieces, i.in.count)
	b, err := json.Marshal(i.state)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(i.states), filepath.Base(i.states)+"-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), i.states)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// publish gives the image its name.
func (i *importer) publish() error {
	if err := errors.Join(i.disk.Flush(), i.disk.Close()); err != nil {
		return errors.Join(err, i.drop())
	}
	if err := os.Link(i.image, i.out); err != nil { // which replaces nothing
		return fmt.Errorf("%w; the image is whole, and is %s", err, i.image)
	}
	if err := syncFolder(filepath.Dir(i.out)); err != nil {
		return err
	}
	return i.forget()
}

// drop leaves nothing.
func (i *importer) drop() error { return errors.Join(i.disk.Close(), i.forget()) }

func (i *importer) forget() error {
	err := os.Remove(i.states)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(os.Remove(i.image), err)
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
