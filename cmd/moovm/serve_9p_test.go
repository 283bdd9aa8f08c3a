package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hugelgupf/p9/p9"
	"go.uber.org/goleak"

	"github.com/moovm/moovm/cowdisk"
)

// cli runs the program in this process and returns what it printed.
func cli(t *testing.T, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	root := newRootCommand()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&errs)
	if err := root.ExecuteContext(t.Context()); err != nil {
		t.Fatalf("moovm %s: %v\n%s", strings.Join(args, " "), err, errs.String())
	}
	return out.String()
}

// serve9P runs `moovm serve 9p` and returns a client's view of the tree.
func serve9P(t *testing.T, args ...string) p9.File {
	t.Helper()
	root, _ := serve9PAt(t, args...)
	return root
}

// serve9PAt says where, too.
func serve9PAt(t *testing.T, args ...string) (root9P p9.File, socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	root := newRootCommand()
	root.SetArgs(append([]string{"-q", "serve", "9p", "--listen", "unix:" + socket}, args...))
	root.SetOut(io.Discard)
	root.SetErr(io.Discard)
	go func() { done <- root.ExecuteContext(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("serve 9p: %v", err)
			}
		case <-time.After(20 * time.Second):
			t.Error("serve 9p does not end")
		}
		if _, err := os.Lstat(socket); !os.IsNotExist(err) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
	var conn net.Conn
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		var err error
		if conn, err = net.Dial("unix", socket); err == nil {
			break
		}
		select {
		case err := <-done:
			done <- err
			t.Fatalf("serve 9p: %v", err)
		default:
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket: %v, %v", st.Mode(), err)
	}
	client, err := p9.NewClient(conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	f, err := client.Attach("")
	if err != nil {
		t.Fatal(err)
	}
	return f, socket
}

// fileOf reads a file of the tree, whose size must be right before that.
func fileOf(t *testing.T, root p9.File, path string) string {
	t.Helper()
	_, f, err := root.Walk(strings.Split(path, "/"))
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	defer f.Close()
	_, _, attr, err := f.GetAttr(p9.AttrMaskAll)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Open(p9.ReadOnly); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<40))
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	if attr.Size != uint64(len(b)) {
		t.Errorf("%s: stat said %d bytes, there are %d", path, attr.Size, len(b))
	}
	return string(b)
}

// layoutFields says where a header has what, as the format's description does.
type layoutFields struct {
	variant                         cowdisk.Variant
	version                         uint32
	little                          bool
	path, mtime, size, sector, head int
	align                           int // 0: the layout has none
}

var layoutTable = []layoutFields{
	{variant: cowdisk.QEMUV2, version: 2, path: 8, mtime: 1032, size: 1040, sector: 1048, head: 1056},
	{variant: cowdisk.QEMUV2i386, version: 2, path: 8, mtime: 1032, size: 1036, sector: 1044, head: 1048},
	{variant: cowdisk.UMLV1, version: 1, little: true, path: 8, mtime: 264, size: 268, sector: 276, head: 280},
	{variant: cowdisk.UMLV1Unpacked, version: 1, little: true, path: 8, mtime: 264, size: 272, sector: 280, head: 288},
	{variant: cowdisk.UMLV2, version: 2, path: 8, mtime: 4104, size: 4108, sector: 4116, head: 4120},
	{variant: cowdisk.UMLV2Unpacked, version: 2, path: 8, mtime: 4104, size: 4112, sector: 4120, head: 4128},
	{variant: cowdisk.UMLV3, version: 3, path: 32, mtime: 8, size: 12, sector: 20, head: 4128, align: 24},
	{variant: cowdisk.UMLV3Broken, version: 3, path: 36, mtime: 8, size: 16, sector: 24, head: 4136, align: 28},
}

// image makes an image of the layout in which every third 4 KiB unit is
// allocated, and returns the header and the bitmap.
func (l layoutFields) image(size int, backing string, mtime uint32) (file, header, bitmap []byte) {
	var o binary.ByteOrder = binary.BigEndian
	if l.little {
		o = binary.LittleEndian
	}
	header = make([]byte, l.head)
	o.PutUint32(header, 0x4f4f4f4d)
	o.PutUint32(header[4:], l.version)
	copy(header[l.path:], backing)
	o.PutUint32(header[l.mtime:], mtime)
	o.PutUint64(header[l.size:], uint64(size))
	o.PutUint32(header[l.sector:], 512)
	bitmapAt, unit := l.head, 512
	if l.align > 0 {
		o.PutUint32(header[l.align:], 4096)
		bitmapAt, unit = 8192, 4096
	}
	bitmap = make([]byte, size/4096)
	for i := 0; i < len(bitmap); i += 3 {
		bitmap[i] = 0xff
	}
	data := (bitmapAt + len(bitmap) + unit - 1) / unit * unit
	file = bytes.Repeat([]byte{0xda}, data+size)
	clear(file[:data])
	copy(file, header)
	copy(file[bitmapAt:], bitmap)
	return file, header, bitmap
}

// The tree on a socket, of an image of every header layout: each file says
// what `moovm info` and `moovm map` print, or has the bytes of the file.
func TestServe9PLayouts(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	const size = 256 << 10
	for _, l := range layoutTable {
		t.Run(l.variant.String(), func(t *testing.T) {
			dir := t.TempDir()
			base := filepath.Join(dir, "base.img")
			if err := os.WriteFile(base, make([]byte, size), 0o666); err != nil {
				t.Fatal(err)
			}
			when := time.Unix(1_400_000_000, 0)
			if err := os.Chtimes(base, when, when); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "top.cow")
			file, header, bitmap := l.image(size, "base.img", uint32(when.Unix()))
			if err := os.WriteFile(path, file, 0o666); err != nil {
				t.Fatal(err)
			}
			var infos []json.RawMessage
			if err := json.Unmarshal([]byte(cli(t, "info", "--json", "--chain", path)), &infos); err != nil || len(infos) != 2 {
				t.Fatalf("%d layers, %v", len(infos), err)
			}
			revealed := serve9P(t, "--reveal-paths", path)
			hidden := serve9P(t, path+",serial=S1")

			for file, want := range map[string]string{
				"info":         cli(t, "info", "--json", path),
				"header":       string(header),
				"bitmap":       string(bitmap),
				"format":       "cow\n",
				"variant":      l.variant.String() + "\n",
				"size":         fmt.Sprintln(size),
				"sector_size":  "512\n",
				"backing_file": "base.img\n",
				"mtime":        "1400000000\n",
				"read_only":    "1\n",
				"allocated":    fmt.Sprintln((size/4096 + 2) / 3 * 8),
			} {
				for _, at := range []string{"disks/vda/", "disks/vda/chain/0/"} {
					if got := fileOf(t, revealed, at+file); got != want {
						t.Errorf("%s: %q, want %q", at+file, got, want)
					}
					if got := fileOf(t, hidden, at+file); got != want && file != "info" {
						t.Errorf("%s without paths: %q, want %q", at+file, got, want)
					}
				}
			}
			same := func(what, a, b string) {
				t.Helper()
				var x, y bytes.Buffer
				if err := json.Compact(&x, []byte(a)); err != nil {
					t.Errorf("%s: %v in %q", what, err, a)
				}
				if err := json.Compact(&y, []byte(b)); err != nil {
					t.Errorf("%s: %v in %q", what, err, b)
				}
				if x.String() != y.String() {
					t.Errorf("%s: %s, want %s", what, &x, &y)
				}
			}
			same("map", fileOf(t, revealed, "disks/vda/map"), cli(t, "map", "--json", path))
			same("chain/1/info", fileOf(t, revealed, "disks/vda/chain/1/info"), string(infos[1]))
			if got := fileOf(t, hidden, "disks/vda/serial"); got != "S1\n" {
				t.Errorf("serial %q", got)
			}

			// Without --reveal-paths no file names the image's folder.
			files := 0
			var look func(f p9.File, path string)
			look = func(f p9.File, path string) {
				_, d, err := f.Walk(nil)
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				if _, _, err := d.Open(p9.ReadOnly); err != nil {
					t.Fatal(err)
				}
				entries, err := d.Readdir(0, 1<<16)
				if err != nil {
					t.Fatal(err)
				}
				for _, e := range entries {
					_, c, err := f.Walk([]string{e.Name})
					if err != nil {
						t.Fatal(err)
					}
					switch e.QID.Type {
					case p9.TypeDir:
						look(c, path+e.Name+"/")
					case p9.TypeRegular:
						files++
						if got := fileOf(t, hidden, path+e.Name); strings.Contains(got, dir) {
							t.Errorf("%s%s names %s", path, e.Name, dir)
						}
					}
					c.Close()
				}
			}
			look(hidden, "")
			if files != 1+3*14 {
				t.Errorf("%d files in the tree", files)
			}
		})
	}
}

// Disks are named as Linux names them, however many there are.
func TestServe9PNames(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	path := filepath.Join(t.TempDir(), "d.cow")
	cli(t, "-q", "create", "-s", "1M", path)
	var args []string
	for range 28 {
		args = append(args, path)
	}
	root := serve9P(t, args...)
	for _, name := range []string{"vda", "vdz", "vdaa", "vdab"} {
		if got := fileOf(t, root, "disks/"+name+"/size"); got != "1048576\n" {
			t.Errorf("%s: %q", name, got)
		}
	}
}

// diod's client, which asks whether it must authenticate first.
func TestServe9PDiod(t *testing.T) {
	diodcat, err := exec.LookPath("diodcat")
	if err != nil {
		t.Skip("needs diodcat; install the package diod")
	}
	path := filepath.Join(t.TempDir(), "d.cow")
	cli(t, "-q", "create", "-s", "1M", path)
	root, socket := serve9PAt(t, path)
	out, err := exec.Command(diodcat, "-s", socket, "-a", "/", "disks/vda/info", "version").CombinedOutput()
	if err != nil || string(out) != fileOf(t, root, "disks/vda/info")+fileOf(t, root, "version") {
		t.Errorf("%q, %v", out, err)
	}
}
