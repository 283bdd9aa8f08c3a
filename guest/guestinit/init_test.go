package guestinit

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moovm/moovm/internal/blkid/blkidtest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCommandEnv(t *testing.T) {
	env := commandEnv([]string{"PATH=/x", "LANG=C", "TERM=", "NOVALUE"})
	if envValue(env, "PATH") != "/x" || envValue(env, "HOME") != "/root" || envValue(env, "LANG") != "C" || envValue(env, "TERM") != "" {
		t.Errorf("%q", env)
	}
	seen := map[string]bool{}
	for _, e := range env {
		key, _, _ := strings.Cut(e, "=")
		if seen[key] {
			t.Errorf("%s is there twice", key)
		}
		seen[key] = true
	}
}

func TestParseRootSpec(t *testing.T) {
	for s, want := range map[string]rootSpec{
		"/dev/vda":                     {"NAME", "vda"},
		"vdb2":                         {"NAME", "vdb2"},
		"UUID=1234":                    {"UUID", "1234"},
		"uuid=1234":                    {"UUID", "1234"},
		`LABEL="my disk"`:              {"LABEL", "my disk"},
		"PARTUUID=abc-02":              {"PARTUUID", "abc-02"},
		"SERIAL=disk0":                 {"SERIAL", "disk0"},
		"/dev/disk/by-id/virtio-disk0": {"SERIAL", "disk0"},
		"/dev/disk/by-uuid/1-2":        {"UUID", "1-2"},
		"/dev/disk/by-label/root":      {"LABEL", "root"},
		"/dev/disk/by-partuuid/abc-1":  {"PARTUUID", "abc-1"},
		"254:1":                        {"DEVNO", "254:1"},
	} {
		if got, err := parseRootSpec(s); err != nil || got != want {
			t.Errorf("%s: got %+v, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "UUID=", "WHAT=x", "/dev/", "/dev/mapper/x", "..", "/dev/..", "a b", "/dev/disk/by-uuid/"} {
		if got, err := parseRootSpec(s); err == nil || !strings.Contains(err.Error(), "root=") {
			t.Errorf("%q: got %+v, %v", s, got, err)
		}
	}
}

// fakeDisks is a /sys/class/block with two disks, one of them in partitions,
// and what the devices contain.
func fakeDisks(t *testing.T) (sys string, open func(string) (readAtCloser, error)) {
	t.Helper()
	sys = t.TempDir()
	for name, value := range map[string]string{
		"vda/dev": "254:0\n", "vda/size": "4096\n", "vda/serial": "root-disk\n", "vda/ro": "1\n",
		"vdb/dev": "254:16\n", "vdb/size": "20480\n", "vdb/ro": "0\n",
		"vdb1/dev": "254:17\n", "vdb1/size": "2048\n", "vdb1/partition": "1\n",
		"vdb2/dev": "254:18\n", "vdb2/size": "8192\n", "vdb2/partition": "2\n",
		"nvme0n1/dev": "259:0\n", "nvme0n1/size": "3000000000\n",
		"nvme0n1p1/dev": "259:1\n", "nvme0n1p1/size": "8\n", "nvme0n1p1/partition": "1\n",
		"loop0/dev": "7:0\n", "loop0/size": "8\n", "vdc/dev": "254:32\n", "vdc/size": "0\n",
	} {
		writeFile(t, filepath.Join(sys, name), []byte(value))
	}
	ext := make([]byte, 4096)
	copy(ext[1024+0x38:], "\x53\xef")
	copy(ext[1024+0x68:], "\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10")
	copy(ext[1024+0x78:], "root")
	ext[1024+0x5c], ext[1024+0x60] = 4, 0x40 // journal, extents
	devices := map[string][]byte{"vda": ext, "vdb": blkidtest.GPT(), "nvme0n1": blkidtest.MBR()}
	return sys, func(name string) (readAtCloser, error) {
		b, ok := devices[name]
		if !ok {
			return nil, errors.New("no such device")
		}
		return struct {
			io.ReaderAt
			io.Closer
		}{bytes.NewReader(b), io.NopCloser(nil)}, nil
	}
}

func TestListBlockDevices(t *testing.T) {
	sys, open := fakeDisks(t)
	devs := listBlockDevices(sys, open)
	var names []string
	for _, d := range devs {
		names = append(names, d.String())
	}
	const uuid = "01020304-0506-0708-090a-0b0c0d0e0f10"
	want := "nvme0n1 (1.4 TiB); nvme0n1p1 (4 KiB, PARTUUID=deadbeef-01); " +
		"vda (2 MiB, ext4, LABEL=root, UUID=" + uuid + ", SERIAL=root-disk); vdb (10 MiB); " +
		"vdb1 (1 MiB, PARTUUID=12345678-9abc-def0-0102-030405060700); vdb2 (4 MiB, PARTUUID=12345678-9abc-def0-0102-030405060701)"
	if got := strings.Join(names, "; "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for spec, want := range map[string]string{
		"/dev/vdb": "vdb", "UUID=" + strings.ToUpper(uuid): "vda", "LABEL=root": "vda", "SERIAL=root-disk": "vda", "254:18": "vdb2",
		"PARTUUID=12345678-9ABC-def0-0102-030405060701": "vdb2", "PARTUUID=deadbeef-01": "nvme0n1p1",
		"LABEL=Root": "", "/dev/vdz": "", "SERIAL=x": "", "1:1": "", "UUID=x": "",
	} {
		s, err := parseRootSpec(spec)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, d := range devs {
			if s.matches(d) {
				got += d.Name
			}
		}
		if got != want {
			t.Errorf("%s: got %q, want %q", spec, got, want)
		}
	}
	if !devs[2].ReadOnly || devs[3].ReadOnly {
		t.Error("read-only is wrong")
	}
	if err := noRootError("LABEL=x", devs, 10); !strings.Contains(err.Error(), "no root device LABEL=x after 10 s; the guest has: nvme0n1 (1.4 TiB)") {
		t.Error(err)
	}
	if err := noRootError("LABEL=x", nil, 10); !strings.Contains(err.Error(), "no disks at all") {
		t.Error(err)
	}
}

func TestModuleParams(t *testing.T) {
	line := `console=ttyS0 virtio-blk.num_request_queues=1 virtio_blk.x="a b" nbd.n root=/dev/vda.x=y`
	if got := moduleParams(line, "virtio_blk"); got != `num_request_queues=1 x="a b"` {
		t.Errorf("%q", got)
	}
	if got := moduleParams(line, "ext4"); got != "" {
		t.Errorf("%q", got)
	}
}

func TestIsInit(t *testing.T) {
	if os.Getpid() != 1 && IsInit() {
		t.Error("a test takes itself for the init")
	}
}

func writeFile(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
