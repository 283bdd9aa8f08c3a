package guesttest

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/moovm/moovm/cowdisk"
	"github.com/moovm/moovm/internal/host"
	"github.com/moovm/moovm/virtioblk"
)

// Disk is a further disk of a guest.
type Disk struct {
	// Size of an empty disk, in bytes.
	Size int64
	// Image is a disk image instead; the guest writes into an overlay on it.
	Image string
	// Format says what Image is. FormatUnknown takes a name that ends in .cow
	// or ,format=cow for a COW image, one that ends in ,format=raw for a raw
	// disk, and looks at others: "Raw or COW" in package cowdisk.
	Format cowdisk.Format
	// ReadOnly makes the guest see a read-only disk.
	ReadOnly bool
	// Serial is the identity the guest reads, at most 20 bytes.
	Serial string
	// Faults are injected errors.
	Faults []Fault
	// Slow is added to every request.
	Slow time.Duration
	// VolatileCache models a disk with a write cache: when Kill or Reset cut
	// the power, each write that was not flushed is lost, or not, at random.
	VolatileCache bool
}

// Fault makes requests fail with an I/O error that touch a range of a disk.
type Fault struct {
	// Op is read, write, flush or discard; empty means reads and writes.
	Op string
	// Offset and Length are the range in bytes; Length 0 reaches to the end.
	Offset, Length int64
}

// image is the image's file and what it is.
func (d *Disk) image() (path string, f cowdisk.Format, err error) {
	if d.Format != cowdisk.FormatUnknown {
		return d.Image, d.Format, nil
	}
	return cowdisk.SplitFormat(d.Image)
}

func (d *Disk) check() error {
	if _, _, err := d.image(); err != nil {
		return err
	}
	switch {
	case d.Size <= 0 && d.Image == "":
		return errors.New("a disk needs a size, such as size=1G, or an image")
	case d.Size != 0 && d.Image != "":
		return errors.New("a disk has a size or an image, not both")
	case d.Size%512 != 0:
		return fmt.Errorf("disk of %d bytes: a disk has whole sectors of 512", d.Size)
	case len(d.Serial) > 20:
		return fmt.Errorf("the serial %q is longer than virtio-blk's 20 bytes", d.Serial)
	case d.Slow < 0:
		return fmt.Errorf("a disk cannot be slow by %v", d.Slow)
	}
	for _, f := range d.Faults {
		switch f.Op {
		case "", "read", "write", "flush", "discard":
		default:
			return fmt.Errorf("fault %q: use read, write, flush or discard", f.Op)
		}
	}
	return nil
}

// ParseDisk reads size=1G[,ro][,serial=NAME][,slow=5ms][,fault=[OP:]EIO@OFFSET[+LENGTH]]…
// or FILE[,format=raw|cow][,…]; parseSize reads sizes such as 512, 64K, 1G. A
// comma in the file's name is written twice.
func ParseDisk(s string, parseSize func(string) (int64, error)) (Disk, error) {
	var d Disk
	bad := func(err error) (Disk, error) { return d, fmt.Errorf("--disk %s: %w", s, err) }
	for i, w := range strings.Split(strings.ReplaceAll(s, ",,", "\x00"), ",") {
		w = strings.ReplaceAll(w, "\x00", ",")
		key, value, has := strings.Cut(w, "=")
		var err error
		switch {
		case key == "size" && has:
			d.Size, err = parseSize(value)
		case w == "ro":
			d.ReadOnly = true
		case w == "volatile":
			d.VolatileCache = true
		case key == "format" && has:
			d.Format, err = cowdisk.ParseFormat(value)
		case key == "serial" && has:
			d.Serial = value
		case key == "slow" && has:
			d.Slow, err = time.ParseDuration(value)
		case key == "fault" && has:
			var f Fault
			f, err = parseFault(value, parseSize)
			d.Faults = append(d.Faults, f)
		case i == 0 && w != "" && (!has || strings.Contains(key, "/")):
			d.Image = w
		default:
			err = fmt.Errorf("there is no option %q; use size=SIZE or a file, ro, format=raw, format=cow, serial=NAME, slow=TIME, volatile, fault=[OP:]EIO@OFFSET[+LENGTH]", w)
		}
		if err != nil {
			return bad(err)
		}
	}
	if err := d.check(); err != nil {
		return bad(err)
	}
	return d, nil
}

func parseFault(s string, parseSize func(string) (int64, error)) (f Fault, err error) {
	what, where, _ := strings.Cut(s, "@")
	op, errno, both := strings.Cut(what, ":")
	if !both {
		op, errno = "", what
	}
	if errno != "EIO" {
		return f, fmt.Errorf("fault %q: a disk fails with EIO, such as fault=EIO@1M+4K or fault=write:EIO@0", s)
	}
	f.Op = op
	if where == "" {
		return f, nil
	}
	from, length, has := strings.Cut(where, "+")
	if f.Offset, err = parseSize(from); err == nil && has {
		f.Length, err = parseSize(length)
	}
	return f, err
}

func (f Fault) hits(op virtioblk.Op, off, n int64) bool {
	switch {
	case f.Op == "" && op != virtioblk.OpRead && op != virtioblk.OpWrite && op != virtioblk.OpWriteZeroes:
		return false
	case f.Op == "write" && op == virtioblk.OpWriteZeroes:
	case f.Op != "" && f.Op != string(op):
		return false
	}
	if op == virtioblk.OpFlush {
		return true
	}
	return off+n > f.Offset && (f.Length == 0 || off < f.Offset+f.Length)
}

// faulty puts the disk's faults and its slowness over a backend.
func (d *Disk) faulty(b virtioblk.Backend) virtioblk.Backend {
	if len(d.Faults) == 0 && d.Slow == 0 {
		return b
	}
	return &virtioblk.Faulty{Backend: b, Before: func(op virtioblk.Op, off, n int64) error {
		time.Sleep(d.Slow)
		for _, f := range d.Faults {
			if f.hits(op, off, n) {
				return syscall.EIO
			}
		}
		return nil
	}}
}

// createDisk makes the disk's file at path, an overlay on its image if it has
// one, and opens it.
func createDisk(path string, d Disk) (*cowdisk.Disk, error) {
	base, format, err := d.image()
	if err != nil {
		return nil, err
	}
	roots := host.BackingRoots() // for what the base lies on
	if err := cowdisk.Create(path, cowdisk.CreateOptions{Size: d.Size, Backing: base, BackingFormat: format, BackingRoots: roots}); err != nil {
		return nil, err
	}
	return cowdisk.Open(path, cowdisk.Options{Backing: base, BackingRoots: roots})
}
