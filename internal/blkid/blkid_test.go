package blkid

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/moovm/moovm/internal/blkid/blkidtest"
)

func TestProbe(t *testing.T) {
	image := func(size int, parts map[int]string) []byte {
		b := make([]byte, size)
		for off, s := range parts {
			copy(b[off:], s)
		}
		return b
	}
	const id = "0123456789abcdef"
	const uuid = "30313233-3435-3637-3839-616263646566"
	for name, c := range map[string]struct {
		b    []byte
		want FS
	}{
		"nothing":  {make([]byte, 1<<17), FS{}},
		"empty":    {nil, FS{}},
		"ext2":     {image(4096, map[int]string{1024 + 0x38: "\x53\xef", 1024 + 0x68: id, 1024 + 0x78: "a\x00b"}), FS{"ext2", uuid, "a"}},
		"ext3":     {image(4096, map[int]string{1024 + 0x38: "\x53\xef", 1024 + 0x5c: "\x04"}), FS{Type: "ext3", UUID: formatUUID(make([]byte, 16))}},
		"xfs":      {image(4096, map[int]string{0: "XFSB", 0x20: id, 0x6c: "data"}), FS{"xfs", uuid, "data"}},
		"btrfs":    {image(1<<17, map[int]string{0x10040: "_BHRfS_M", 0x10020: id, 0x1012b: "pool"}), FS{"btrfs", uuid, "pool"}},
		"squashfs": {image(4096, map[int]string{0: "hsqs"}), FS{Type: "squashfs"}},
		"erofs":    {image(4096, map[int]string{1024: "\xe2\xe1\xf5\xe0", 1024 + 0x30: id, 1024 + 0x40: "ero"}), FS{"erofs", uuid, "ero"}},
		"f2fs":     {image(4096, map[int]string{1024: "\x10\x20\xf5\xf2", 1024 + 0x6c: id}), FS{Type: "f2fs", UUID: uuid}},
	} {
		if got := Probe(bytes.NewReader(c.b)); got != c.want {
			t.Errorf("%s: got %+v, want %+v", name, got, c.want)
		}
	}
	if len(PartUUIDs(bytes.NewReader(nil))) != 0 || len(PartUUIDs(bytes.NewReader(make([]byte, 4096)))) != 0 {
		t.Error("partitions on nothing")
	}
}

// What mke2fs writes is read as blkid reads it.
func TestProbeRealExt4(t *testing.T) {
	if _, err := exec.LookPath("mke2fs"); err != nil {
		t.Skip("mke2fs is missing: apt-get install e2fsprogs")
	}
	img := filepath.Join(t.TempDir(), "img")
	const uuid = "6f0a1b2c-0000-4000-8000-00000000abcd"
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-L", "label", "-U", uuid, img, "4M").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if got := Probe(f); got != (FS{"ext4", uuid, "label"}) {
		t.Errorf("got %+v", got)
	}
}

func FuzzProbe(f *testing.F) {
	f.Add(blkidtest.GPT())
	f.Add(blkidtest.MBR())
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		if i := Probe(r); i.Type == "" && i != (FS{}) {
			t.Errorf("%+v", i)
		}
		if n := len(PartUUIDs(r)); n > 1024 {
			t.Errorf("%d partitions", n)
		}
	})
}
