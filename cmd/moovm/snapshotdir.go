package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/cowdisk"
)

// snapshotAbout is what a snapshot's folder says of itself, beside the guest's
// own state.
type snapshotAbout struct {
	Moovm   string    `json:"moovm"` // the version that wrote it
	Created time.Time `json:"created"`
	Kernel  string    `json:"kernel"`  // file
	Release string    `json:"release"` // the kernel's
	CPU     string    `json:"cpu"`     // the host's model
	Memory  int64     `json:"memory"`
	CPUs    int       `json:"cpus"`

	Disks  []snapshotDisk  `json:"disks,omitempty"`
	Shares []snapshotShare `json:"shares,omitempty"`
	// Modules says that the guest has its kernel's as a share.
	Modules bool `json:"modules,omitempty"`
	// Agent says that commands can be run in it, and Commands how many were.
	Agent    bool   `json:"agent"`
	Commands uint32 `json:"commands,omitempty"`
}

// snapshotDisk is a disk: an overlay in the folder, and what it stands on.
type snapshotDisk struct {
	File  string         `json:"file"`
	Bases []snapshotBase `json:"bases"`
}

// snapshotBase is a file that the snapshot stands on, and what it was.
type snapshotBase struct {
	Path  string `json:"path"`
	Size  int64  `json:"size"`
	MTime int64  `json:"mtime"` // ns since 1970
	// SHA256 is a sum of the blocks of 64 KiB that are not all zeros, each
	// behind its offset (8 bytes, little-endian): holes cost nothing.
	SHA256 string `json:"sha256"`
}

// snapshotShare is a folder of the host that the guest has.
type snapshotShare struct {
	Tag      string `json:"tag"`
	Writable bool   `json:"writable,omitempty"`
}

// partial is a snapshot's folder while it is made, under a name of its own. It
// is locked; what a killed program left is removed by the next one.
type partial struct {
	path, final string
	lock        *os.File
}

// newPartial begins to make the folder dir, which must not exist.
func newPartial(dir string) (*partial, error) {
	final, err := absPath(dir)
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(final); err == nil {
		return nil, fmt.Errorf("%s exists; name a folder that does not, or remove it", dir)
	}
	p := &partial{path: final + ".partial", final: final}
	for range 2 {
		if err := os.Mkdir(p.path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, err
		}
		if p.lock, err = os.OpenFile(p.path, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err != nil {
			return nil, err
		}
		if unix.Flock(int(p.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			p.lock.Close()
			return nil, fmt.Errorf("%s: another moovm is making this snapshot", dir)
		}
		names, err := p.lock.Readdirnames(1)
		if len(names) == 0 && errors.Is(err, io.EOF) {
			return p, nil
		}
		// A leftover.
		err = os.RemoveAll(p.path)
		p.lock.Close()
		if err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%s: others make this snapshot, too", dir)
}

// publish gives the folder its name, whole. Nothing is written to it any more.
func (p *partial) publish() error {
	if err := p.lock.Sync(); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, p.path, unix.AT_FDCWD, p.final, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) { // 9P, NFS
		err = unix.Renameat(unix.AT_FDCWD, p.path, unix.AT_FDCWD, p.final)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", p.final, err)
	}
	p.path = ""
	d, err := os.Open(filepath.Dir(p.final))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Close removes the folder unless it was published.
func (p *partial) Close() error {
	var err error
	if p.path != "" {
		err = os.RemoveAll(p.path)
	}
	return errors.Join(err, p.lock.Close())
}

// addDisk makes an overlay in the folder for disk i, on base, which is open.
func (p *partial) addDisk(i int, base *cowdisk.Disk, o cowdisk.Options) (*cowdisk.Disk, snapshotDisk, error) {
	about := snapshotDisk{File: fmt.Sprintf("disk%d.cow", i)}
	format := cowdisk.FormatRaw
	if base.Info().Format == "cow" {
		format = cowdisk.FormatCOW
	}
	path, err := absPath(base.Path())
	if err != nil {
		return nil, about, err
	}
	at := path
	for _, l := range base.Layers() {
		b, err := describeBase(at)
		if err != nil {
			return nil, about, err
		}
		about.Bases = append(about.Bases, b)
		at = l.Info().FullBackingFilename
	}
	file := filepath.Join(p.path, about.File)
	co := cowdisk.CreateOptions{Backing: path, BackingFormat: format, BackingRoots: o.BackingRoots, AllowStaleBacking: o.AllowStaleBacking}
	if _, err := advise(nil, cowdisk.Create(file, co)); err != nil {
		return nil, about, err
	}
	o.Backing, o.Log = path, nil
	d, err := advise(cowdisk.Open(file, o))
	return d, about, err
}

func describeBase(path string) (snapshotBase, error) {
	b := snapshotBase{Path: path}
	st, err := os.Stat(path)
	if err == nil {
		b.Size, b.MTime = st.Size(), st.ModTime().UnixNano()
		b.SHA256, err = sumBlocks(path)
	}
	return b, err
}

// sumBlocks is the sum of a base's contents; see snapshotBase.
func sumBlocks(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	buf := make([]byte, 64<<10)
	zeros := make([]byte, len(buf))
	for off := int64(0); ; off += int64(len(buf)) {
		if data, err := f.Seek(off, unix.SEEK_DATA); err == nil {
			off = data &^ int64(len(buf)-1)
		} else if errors.Is(err, unix.ENXIO) { // nothing but a hole comes
			break
		}
		n, err := f.ReadAt(buf, off)
		if n > 0 && string(buf[:n]) != string(zeros[:n]) {
			sum.Write(binary.LittleEndian.AppendUint64(nil, uint64(off)))
			sum.Write(buf[:n])
		}
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return "", err
		}
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// check says whether the base is what it was. moved says that only its time is
// another.
func (b snapshotBase) check() (moved bool, err error) {
	st, err := os.Stat(b.Path)
	if err != nil {
		return false, fmt.Errorf("a base of the snapshot is missing: %w", err)
	}
	if st.Size() == b.Size && st.ModTime().UnixNano() == b.MTime {
		return false, nil
	}
	sum := ""
	if st.Size() == b.Size {
		if sum, err = sumBlocks(b.Path); err != nil {
			return false, err
		}
	}
	if sum != b.SHA256 {
		return false, fmt.Errorf("the base %s has changed since the snapshot was taken; put it back as it was", b.Path)
	}
	return true, nil
}

// hostCPU is the model of this machine's processors.
func hostCPU() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, model, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(model)
		}
	}
	return ""
}
