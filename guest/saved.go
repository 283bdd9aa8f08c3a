package guest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/internal/bytejson"
	"github.com/moovm/moovm/vmm"
)

// ManifestFile is the file of a saved snapshot that says what it is, beside those
// of the machine (vmm.Snapshot.Save).
const ManifestFile = "snapshot.json"

// manifest is its contents.
type manifest struct {
	Format string
	SHA256 string // of Guest's bytes
	Guest  json.RawMessage
}

// savedGuest is what the manifest says of the guest.
type savedGuest struct {
	Version int
	Shape   shape
	About   json.RawMessage // the caller's
}

const (
	manifestFormat  = "moovm snapshot"
	manifestVersion = 1
	// maxManifest bounds what is read, in bytes.
	maxManifest = 4 << 20
)

// Save writes the snapshot into the folder dir, as files that only their owner
// may read, with whatever about says as JSON. All is on disk when Save returns,
// ManifestFile last: without it there is no snapshot.
func (s *Snapshot) Save(dir string, about any) error {
	if err := s.machine.Save(dir); err != nil {
		return err
	}
	b, err := encodeManifest(s.shape, about)
	if err != nil {
		return err
	}
	if len(b) > maxManifest {
		return fmt.Errorf("%s: its %d bytes are more than %d", filepath.Join(dir, ManifestFile), len(b), maxManifest)
	}
	f, err := os.OpenFile(filepath.Join(dir, ManifestFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o400)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func encodeManifest(s shape, about any) ([]byte, error) {
	b, err := bytejson.Marshal(about)
	if err != nil {
		return nil, err
	}
	if b, err = bytejson.Marshal(savedGuest{Version: manifestVersion, Shape: s, About: b}); err != nil {
		return nil, err
	}
	sum := sha256.Sum256(b)
	b, err = bytejson.Marshal(manifest{Format: manifestFormat, SHA256: hex.EncodeToString(sum[:]), Guest: b})
	return append(b, '\n'), err
}

// ReadManifest reads what Save was told about the snapshot in dir. The error
// wraps vmm.ErrSnapshotDamaged, vmm.ErrSnapshotVersion or fs.ErrNotExist and
// names the file.
func ReadManifest(dir string, about any) error {
	_, err := readManifest(dir, about)
	return err
}

func readManifest(dir string, about any) (s shape, err error) {
	path := filepath.Join(dir, ManifestFile)
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return s, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil {
		return s, err
	} else if !fi.Mode().IsRegular() {
		return s, &fs.PathError{Op: "open", Path: path, Err: errors.New("is not a regular file")}
	}
	b, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err != nil {
		return s, err
	}
	if s, err = decodeManifest(b, about); err != nil {
		return s, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

func decodeManifest(b []byte, about any) (shape, error) {
	damaged := func(what string) (shape, error) {
		return shape{}, fmt.Errorf("%w: %s", vmm.ErrSnapshotDamaged, what)
	}
	if len(b) > maxManifest {
		return damaged(fmt.Sprintf("it has more than %d bytes", maxManifest))
	}
	var m manifest
	if bytejson.Unmarshal(b, &m) != nil || m.Format != manifestFormat {
		return damaged("it is no manifest of a snapshot")
	}
	var body bytes.Buffer // compact, as it was summed
	if err := json.Compact(&body, m.Guest); err != nil {
		return damaged("it is no JSON")
	}
	if sum := sha256.Sum256(body.Bytes()); hex.EncodeToString(sum[:]) != m.SHA256 {
		return damaged("its checksum is not what it says")
	}
	var version struct{ Version int }
	if bytejson.Unmarshal(body.Bytes(), &version) == nil && version.Version > manifestVersion {
		return shape{}, fmt.Errorf("%w: its version is %d, this program knows %d", vmm.ErrSnapshotVersion, version.Version, manifestVersion)
	}
	var g savedGuest
	if err := bytejson.Unmarshal(body.Bytes(), &g); err != nil {
		return damaged(err.Error())
	}
	if g.Version < 1 {
		return damaged(fmt.Sprintf("version %d", g.Version))
	}
	if err := bytejson.Unmarshal(g.About, about); err != nil {
		return damaged(err.Error())
	}
	return g.Shape, nil
}

// OpenSnapshot opens what Save has written, and gives back what that was told
// about it. The memory is mapped by the guests made from it, and never read
// whole: the files must stay as they are as long as those live. Errors are those
// of ReadManifest and vmm.OpenSnapshot.
func OpenSnapshot(dir string, about any) (*Snapshot, error) {
	s, err := readManifest(dir, about)
	if err != nil {
		return nil, err
	}
	m, err := vmm.OpenSnapshot(dir)
	if err != nil {
		return nil, err
	}
	if m.Memory() != s.Memory || m.CPUs() != max(s.CPUs, 1) {
		return nil, errors.Join(fmt.Errorf("%s: %w: %s is of another machine", dir, vmm.ErrSnapshotDamaged, ManifestFile), m.Close())
	}
	return &Snapshot{machine: m, shape: s}, nil
}

// Memory is the guest's memory in bytes.
func (s *Snapshot) Memory() int64 { return s.shape.Memory }

// CPUs is the number of the guest's processors.
func (s *Snapshot) CPUs() int { return max(s.shape.CPUs, 1) }

// HasModules says whether the guest has its kernel's modules as a share, which
// ForkConfig.Modules is for.
func (s *Snapshot) HasModules() bool { return s.shape.HasModules }
