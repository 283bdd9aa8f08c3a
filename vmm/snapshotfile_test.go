package vmm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moovm/moovm/internal/kvm"
	"golang.org/x/sys/unix"
)

// savedHashing saves a machine in the middle of its job, and tells how the job
// ends.
func savedHashing(t *testing.T) (dir, want string) {
	t.Helper()
	m, out := newMachine(t, hashingGuest(8_000), func(c *Config) { c.CPUs = 2 })
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	out.waitFor(t, "!")
	s := takeSnapshot(t, m)
	dir = t.TempDir()
	if err := s.Save(dir); err != nil {
		t.Fatal(err)
	}
	if r, err := waitFor(t, m); r != PowerOff || err != nil {
		t.Fatal(r, err)
	}
	return dir, strings.TrimPrefix(out.String(), "!")
}

func TestSavedSnapshot(t *testing.T) {
	dir, want := savedHashing(t)
	for range 3 {
		s, err := OpenSnapshot(dir)
		if err != nil {
			t.Fatal(err)
		}
		if s.CPUs() != 2 || s.Memory() != 4<<20 {
			t.Errorf("%d CPUs, %d bytes", s.CPUs(), s.Memory())
		}
		m, out := forkOf(t, s)
		if err := errors.Join(s.Close(), s.Close()); err != nil { // the machine keeps what it needs
			t.Fatal(err)
		}
		if err := m.Start(); err != nil {
			t.Fatal(err)
		}
		if r, err := waitFor(t, m); r != PowerOff || err != nil || out.String() != want {
			t.Fatalf("%v, %v, console %q, want %q", r, err, out, want)
		}
	}
	m, _ := newMachine(t, asm{}.spin())
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	if err := takeSnapshot(t, m).Save(dir); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a snapshot over another: %v", err)
	}
	if s, err := OpenSnapshot(dir); err != nil {
		t.Errorf("the first snapshot is gone: %v", err)
	} else {
		s.Close()
	}
}

// resum writes a state file whose checksum is right.
func resum(t testing.TB, dir string, change func(state map[string]json.RawMessage)) {
	t.Helper()
	path := filepath.Join(dir, stateFile)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var saved savedState
	state := map[string]json.RawMessage{}
	if err := errors.Join(json.Unmarshal(b, &saved), json.Unmarshal(saved.State, &state)); err != nil {
		t.Fatal(err)
	}
	change(state)
	if saved.State, err = json.Marshal(state); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(saved.State)
	saved.SHA256 = hex.EncodeToString(sum[:])
	if b, err = json.Marshal(saved); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(path), os.WriteFile(path, b, 0o400)); err != nil {
		t.Fatal(err)
	}
}

// TestSnapshotRefusals damages a saved snapshot in each way there is; the error
// names the file and what is wrong.
func TestSnapshotRefusals(t *testing.T) {
	for name, test := range map[string]struct {
		damage func(t *testing.T, dir string)
		want   error
		says   string
	}{
		"no state":  {func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, stateFile)) }, fs.ErrNotExist, stateFile},
		"no memory": {func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, memoryFile)) }, fs.ErrNotExist, memoryFile},
		"short memory": {func(t *testing.T, dir string) {
			os.Truncate(filepath.Join(dir, memoryFile), 1<<20)
		}, ErrSnapshotDamaged, "1048576 bytes"},
		"a FIFO": {func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, memoryFile))
			unix.Mkfifo(filepath.Join(dir, memoryFile), 0o600)
		}, nil, "not a regular file"},
		"a link out": {func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, memoryFile))
			os.Symlink("/etc/passwd", filepath.Join(dir, memoryFile))
		}, nil, "escapes"},
		"not JSON": {func(t *testing.T, dir string) {
			os.Remove(filepath.Join(dir, stateFile))
			os.WriteFile(filepath.Join(dir, stateFile), []byte("MZ"), 0o600)
		}, ErrSnapshotDamaged, stateFile},
		"newer": {func(t *testing.T, dir string) {
			resum(t, dir, func(s map[string]json.RawMessage) { s["Version"] = json.RawMessage("2") })
		}, ErrSnapshotVersion, "version is 2"},
		"no CPUs": {func(t *testing.T, dir string) {
			resum(t, dir, func(s map[string]json.RawMessage) { s["VCPUs"] = json.RawMessage("[]") })
		}, ErrSnapshotDamaged, "0 CPUs"},
		"huge memory": {func(t *testing.T, dir string) {
			resum(t, dir, func(s map[string]json.RawMessage) { s["Memory"] = json.RawMessage("1e18") })
		}, ErrSnapshotDamaged, "memory"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, _ := savedHashing(t)
			test.damage(t, dir)
			s, err := OpenSnapshot(dir)
			if err == nil {
				s.Close()
				t.Fatal("it opens")
			}
			if test.want != nil && !errors.Is(err, test.want) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestSnapshotEveryByte changes every byte of the state file, a few at a time
// of large ones: an error each time, or a state that is the same.
func TestSnapshotEveryByte(t *testing.T) {
	dir, _ := savedHashing(t)
	b, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		t.Fatal(err)
	}
	var want machineState
	if err := want.decode(b); err != nil {
		t.Fatal(err)
	}
	wantJSON, _ := json.Marshal(want)
	for at := 0; at < len(b); at += 1 + at%97 {
		for _, v := range []byte{b[at] ^ 1, b[at] ^ 0x80, '"', ' '} {
			c := bytes.Clone(b)
			c[at] = v
			var got machineState
			if err := got.decode(c); err != nil {
				if !errors.Is(err, ErrSnapshotDamaged) {
					t.Fatalf("byte %d = %#x: %v", at, v, err)
				}
				continue
			}
			if gotJSON, _ := json.Marshal(got); !bytes.Equal(gotJSON, wantJSON) {
				t.Fatalf("byte %d = %#x goes unnoticed", at, v)
			}
		}
	}
}

// FuzzMachineState decodes states with a right checksum and makes machines of
// those that pass: KVM may refuse them, this program must not fall.
func FuzzMachineState(f *testing.F) {
	f.Add([]byte(`{"Version":1,"Memory":4194304,"VCPUs":[{}]}`))
	f.Add([]byte(`{"Version":1,"Memory":4194304,"VCPUs":[{"XSave":"AAAA","MSRs":[{"Index":16}]}],"Functions":[{}]}`))
	f.Add([]byte(`{"Version":1,"Memory":4194304,"Transport":1,"VCPUs":[{"CPUID":[{"Function":1}]}],"Windows":[{"Core":{"Status":255}}]}`))
	f.Fuzz(func(t *testing.T, state []byte) {
		if !json.Valid(state) {
			return
		}
		var compact bytes.Buffer
		json.Compact(&compact, state)
		sum := sha256.Sum256(compact.Bytes())
		b, err := json.Marshal(savedState{Format: stateFormat, SHA256: hex.EncodeToString(sum[:]), State: compact.Bytes()})
		if err != nil {
			return
		}
		var s machineState
		if s.decode(b) != nil || s.Memory > 16<<20 || len(s.VCPUs) > 2 {
			return
		}
		if _, err := os.Stat(DefaultKVM); err != nil {
			return
		}
		snap := &Snapshot{state: s, mem: newImage(s.Memory, []segment{{length: s.Memory}}), saved: true}
		defer snap.Close()
		m, err := snap.Fork(ForkConfig{})
		if err != nil {
			return
		}
		if err := m.Start(); err == nil {
			m.Stop()
			m.Wait()
		}
		m.Close()
	})
}

// TestSnapshotFits compares processors feature by feature.
func TestSnapshotFits(t *testing.T) {
	host := []kvm.CPUIDEntry{
		{Function: 0, Eax: 0xd, Ebx: 1, Ecx: 2, Edx: 3},
		{Function: 1, Ecx: 1 << 26, Edx: 1},
		{Function: 7, Ebx: 1 << 5},
	}
	change := func(f func(c []kvm.CPUIDEntry)) []kvm.CPUIDEntry {
		c := append([]kvm.CPUIDEntry(nil), host...)
		f(c)
		return c
	}
	for name, test := range map[string]struct {
		guest []kvm.CPUIDEntry
		says  string
	}{
		"same":         {host, ""},
		"fewer":        {change(func(c []kvm.CPUIDEntry) { c[2].Ebx = 0 }), ""},
		"OSXSAVE":      {change(func(c []kvm.CPUIDEntry) { c[1].Ecx |= 1 << 27 }), ""},
		"one more":     {change(func(c []kvm.CPUIDEntry) { c[2].Ebx |= 1 << 16 }), "leaf 0x7.0, EBX bit 16"},
		"other leaf":   {append(change(func([]kvm.CPUIDEntry) {}), kvm.CPUIDEntry{Function: 0xd, Index: 1, Eax: 2}), "leaf 0xd.1, EAX bit 1"},
		"other maker":  {change(func(c []kvm.CPUIDEntry) { c[0].Ebx = 9 }), "another maker"},
		"nothing told": {nil, ""},
	} {
		err := fits(test.guest, host)
		if test.says == "" && err != nil || test.says != "" && (!errors.Is(err, ErrSnapshotHost) || !strings.Contains(err.Error(), test.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
