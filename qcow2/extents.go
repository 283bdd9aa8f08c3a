package qcow2

import "context"

// Kind is what an image has of a range of the disk.
type Kind uint8

// The kinds of extents.
const (
	Absent Kind = iota // nothing: the backing file shows, or zeros
	Zero               // zeros, whatever the backing file has
	Data               // data, compressed or not
)

// String is the kind's name in lower case.
func (k Kind) String() string { return [...]string{"absent", "zero", "data"}[k] }

// Extent is a run of bytes of the disk of one kind.
type Extent struct {
	Start, Length int64
	Kind          Kind
}

// Extents calls yield for each extent of n bytes at off, in order. Neighbours of the same kind are one extent. It ends early with the error
// of yield or ctx; a disk can be larger than anybody has time for.
//
// Errors: ErrRange beyond the end of the disk, ErrCorrupt, ErrTruncated, ErrClosed, ErrRead.
func (m *Image) Extents(ctx context.Context, off, n int64, yield func(Extent) error) error {
	if off < 0 || n < 0 || off > m.hdr.Size || n > m.hdr.Size-off {
		return m.fail("", ErrRange, "", "")
	}
	var last Extent
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		if m.closed.Load() {
			return m.fail("", ErrClosed, "", "")
		}
		r, err := m.find(off, n)
		if err != nil {
			return err
		}
		switch {
		case last.Length > 0 && last.Kind == r.kind:
			last.Length += r.length
		default:
			if last.Length > 0 {
				if err := yield(last); err != nil {
					return err
				}
			}
			last = Extent{Start: off, Length: r.length, Kind: r.kind}
		}
		off, n = off+r.length, n-r.length
	}
	if last.Length > 0 {
		return yield(last)
	}
	return nil
}
