package vmm

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

	"github.com/moovm/moovm/internal/kvm"
	"golang.org/x/sys/unix"
)

// A saved snapshot is two files in a folder: the state as JSON with its
// checksum, and the memory, sparse, as it lies in the guest from address 0 on,
// without the hole below 4 GiB.
const (
	stateFile  = "machine.json"
	memoryFile = "memory"
)

// savedState is the contents of stateFile.
type savedState struct {
	Format string
	SHA256 string // of State's bytes
	State  json.RawMessage
}

const stateFormat = "moovm machine state"

// maxStateFile bounds what OpenSnapshot reads: 64 processors take some 3 MiB.
const maxStateFile = 64 << 20

// ErrSnapshotVersion says that a newer moovm has written the snapshot.
var ErrSnapshotVersion = errors.New("the snapshot was written by a newer moovm")

// Save writes the snapshot into the folder dir, which must not have one, as two
// files that only their owner may read: a memory has secrets. Both are on disk
// when Save returns. After an error, or where the program was killed, what
// there is opens as ErrSnapshotDamaged or not at all; make the folder under
// another name and rename it to have all or nothing.
func (s *Snapshot) Save(dir string) (err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	// The state comes last: a memory without one is no snapshot.
	if err := saveFile(root, memoryFile, func(f *os.File) error { return s.mem.writeFile(f) }); err != nil {
		return fmt.Errorf("save a snapshot in %s: %w", dir, err)
	}
	err = saveFile(root, stateFile, func(f *os.File) error {
		state, err := json.Marshal(s.state)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(state)
		return json.NewEncoder(f).Encode(savedState{Format: stateFormat, SHA256: hex.EncodeToString(sum[:]), State: state})
	})
	if err != nil {
		return fmt.Errorf("save a snapshot in %s: %w", dir, err)
	}
	d, err := root.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// saveFile makes a file that nobody writes to again; a failed one is removed.
func saveFile(root *os.Root, name string, write func(*os.File) error) (err error) {
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o400)
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			root.Remove(name)
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	return f.Sync()
}

// OpenSnapshot opens what Save has written. The memory is mapped by the
// machines made from it, page by page as they touch it, and never read whole:
// the file must stay as it is as long as they live.
//
// The error wraps ErrSnapshotDamaged, ErrSnapshotVersion or fs.ErrNotExist and
// names the file.
func OpenSnapshot(dir string) (_ *Snapshot, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	s := &Snapshot{saved: true}
	if err := s.openState(root); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, stateFile), err)
	}
	if err := s.openMemory(root); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, memoryFile), err)
	}
	return s, nil
}

func (s *Snapshot) openState(root *os.Root) error {
	f, _, err := openRegular(root, stateFile)
	if err != nil {
		return err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxStateFile+1))
	if err != nil {
		return err
	}
	if len(b) > maxStateFile {
		return fmt.Errorf("%w: it has more than %d bytes", ErrSnapshotDamaged, maxStateFile)
	}
	return s.state.decode(b)
}

// decode reads a state and checks everything that this program counts on; what
// only KVM or a device understands they check themselves.
func (s *machineState) decode(b []byte) error {
	var saved savedState
	if err := json.Unmarshal(b, &saved); err != nil || saved.Format != stateFormat {
		return fmt.Errorf("%w: it is no machine state", ErrSnapshotDamaged)
	}
	var state bytes.Buffer // compact, as it was summed
	if err := json.Compact(&state, saved.State); err != nil {
		return fmt.Errorf("%w: %w", ErrSnapshotDamaged, err)
	}
	if sum := sha256.Sum256(state.Bytes()); hex.EncodeToString(sum[:]) != saved.SHA256 {
		return fmt.Errorf("%w: its checksum is not what it says", ErrSnapshotDamaged)
	}
	var version struct{ Version int }
	if json.Unmarshal(state.Bytes(), &version) == nil && version.Version > snapshotVersion {
		return fmt.Errorf("%w: its version is %d, this program knows %d", ErrSnapshotVersion, version.Version, snapshotVersion)
	}
	if err := json.Unmarshal(state.Bytes(), s); err != nil {
		return fmt.Errorf("%w: %w", ErrSnapshotDamaged, err)
	}
	if err := s.check(); err != nil {
		return fmt.Errorf("%w: %w", ErrSnapshotDamaged, err)
	}
	return nil
}

func (s *machineState) check() error {
	if err := checkMemory(s.Memory, false); err != nil {
		return err
	}
	switch {
	case s.Version < 1:
		return fmt.Errorf("version %d", s.Version)
	case len(s.VCPUs) < 1 || len(s.VCPUs) > MaxCPUs:
		return fmt.Errorf("%d CPUs: a machine has 1 to %d", len(s.VCPUs), MaxCPUs)
	case s.Transport != TransportPCI && s.Transport != TransportMMIO:
		return fmt.Errorf("transport %d", s.Transport)
	case len(s.Functions) >= maxSlots || len(s.Windows) > maxWindows:
		return fmt.Errorf("%d devices", len(s.Functions)+len(s.Windows))
	}
	for i, c := range s.Chips {
		if kvm.ChipOf(&c) != uint32(i) {
			return fmt.Errorf("interrupt controller %d calls itself %d", i, kvm.ChipOf(&c))
		}
	}
	for i, u := range s.Serial {
		if len(u.RX) > rxFIFO {
			return fmt.Errorf("%d bytes in the FIFO of serial port %d", len(u.RX), i)
		}
	}
	return nil
}

func (s *Snapshot) openMemory(root *os.Root) error {
	f, size, err := openRegular(root, memoryFile)
	if err != nil {
		return err
	}
	defer f.Close()
	if size != s.state.Memory {
		return fmt.Errorf("%w: it has %d bytes, the machine's memory %d", ErrSnapshotDamaged, size, s.state.Memory)
	}
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	file := &memFile{fd: fd}
	file.refs.Store(1)
	defer file.release()
	segments, err := fileSegments(file, size)
	if err != nil {
		return err
	}
	s.mem = newImage(size, segments)
	return nil
}

// openRegular opens a regular file for reading, and nothing else: a FIFO in
// its place would block.
func openRegular(root *os.Root, name string) (*os.File, int64, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: errors.New("is not a regular file")}
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}
