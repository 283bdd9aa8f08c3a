package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/moovm/moovm/vmm"
)

// sampleManifest is one as Save writes it.
func sampleManifest(t testing.TB) []byte {
	t.Helper()
	s := shape{Memory: 64 << 20, CPUs: 2, ControlTag: "c", Disks: []diskShape{{Serial: "s", Queues: 2}}, Shares: []string{"x"}, Command: true}
	b, err := encodeManifest(s, map[string]string{"who": "me"})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A manifest says what it was told; no byte of it can be another unnoticed.
func TestManifest(t *testing.T) {
	b := sampleManifest(t)
	path := filepath.Join(t.TempDir(), ManifestFile)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	var about map[string]string
	if err := ReadManifest(filepath.Dir(path), &about); err != nil || about["who"] != "me" {
		t.Fatalf("%v, %v", about, err)
	}
	want, err := decodeManifest(b, &about)
	if err != nil {
		t.Fatal(err)
	}
	for i := range bytes.TrimRight(b, "\n") {
		for bit := range 8 {
			other := bytes.Clone(b)
			other[i] ^= 1 << bit
			var a map[string]string
			got, err := decodeManifest(other, &a)
			if err == nil { // the names of fields may be written in capitals
				x, _ := json.Marshal(want)
				y, _ := json.Marshal(got)
				if !bytes.Equal(x, y) || a["who"] != "me" {
					t.Errorf("byte %d, bit %d: taken as %+v, %v", i, bit, got, a)
				}
			} else if !errors.Is(err, vmm.ErrSnapshotDamaged) && !errors.Is(err, vmm.ErrSnapshotVersion) {
				t.Errorf("byte %d, bit %d: %v", i, bit, err)
			}
		}
	}
	for i := range b[:len(b)-2] {
		if _, err := decodeManifest(b[:i], &about); !errors.Is(err, vmm.ErrSnapshotDamaged) {
			t.Errorf("%d bytes: %v", i, err)
		}
	}
}

func FuzzManifest(f *testing.F) {
	f.Add(sampleManifest(f))
	f.Add([]byte(`{"Format":"moovm snapshot"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var about struct {
			Disks []struct{ File string }
		}
		s, err := decodeManifest(b, &about)
		if err == nil {
			_, err = encodeManifest(s, about)
		} else if errors.Is(err, vmm.ErrSnapshotDamaged) || errors.Is(err, vmm.ErrSnapshotVersion) {
			return
		}
		if err != nil {
			t.Error(err)
		}
	})
}
