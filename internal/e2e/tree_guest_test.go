package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/moovm/moovm/cowdisk"
)

// dataDisks makes data.raw ← mid.cow ← top.cow (UML's layout on QEMU's), which
// guests get read-only, and scratch.cow, which they may write to.
func dataDisks(t *testing.T, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "data.raw"), bytes.Repeat([]byte("data.raw"), 8<<20/8), 0o666); err != nil {
		t.Fatal(err)
	}
	moovm(t, dir, "create", "-b", "data.raw", "mid.cow").wantStatus(t, 0)
	put(t, filepath.Join(dir, "mid.cow"), 1<<20, 300_000)
	moovm(t, dir, "create", "-f", "v3", "-b", "mid.cow", "top.cow").wantStatus(t, 0)
	for i := range int64(50) {
		put(t, filepath.Join(dir, "top.cow"), i*i*3000, 100)
	}
	moovm(t, dir, "create", "-s", "64M", "scratch.cow").wantStatus(t, 0)
}

// put writes n bytes at off of a COW image.
func put(t *testing.T, path string, off int64, n int) {
	t.Helper()
	d, err := cowdisk.Open(path, cowdisk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := d.WriteAt(bytes.Repeat([]byte{0xa5}, n), off); err != nil {
		t.Fatal(err)
	}
	if err := d.Flush(); err != nil {
		t.Fatal(err)
	}
}

var actualSize = regexp.MustCompile(`"actual-size":[0-9]+,`)

// wantTree fails unless the folder got holds, file by file, what the host says
// of the image and each layer of its chain.
func wantTree(t *testing.T, dir, got, image string, want map[string]string) {
	t.Helper()
	layers := chainInfo(t, dir, image)
	value := func(path string) string {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(got, path))
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	checked := make(map[string]bool)
	is := func(path, want string) {
		t.Helper()
		checked[path] = true
		if v := value(path); v != want {
			t.Errorf("%s of %s: %q in the guest, %q on the host", path, image, clip(v), clip(want))
		}
	}
	for i := -1; i < len(layers); i++ {
		prefix, l := "", layers[0]
		if i >= 0 {
			prefix, l = fmt.Sprintf("chain/%d/", i), layers[i]
		}
		name := filepath.Base(l.Filename)
		is(prefix+"format", l.Format+"\n")
		is(prefix+"size", fmt.Sprintln(l.VirtualSize))
		is(prefix+"backing_file", l.BackingFilename+"\n")
		is(prefix+"serial", want["serial"]+"\n")
		readOnly := "1\n"
		if i <= 0 {
			readOnly = want["read_only"] + "\n"
		}
		is(prefix+"read_only", readOnly)

		file, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if s := l.FormatSpecific; s != nil {
			d, err := cowdisk.Open(filepath.Join(dir, name), cowdisk.Options{ReadOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			is(prefix+"variant", s.Variant.String()+"\n")
			is(prefix+"mtime", fmt.Sprintln(s.MTime))
			is(prefix+"sector_size", fmt.Sprintln(s.SectorSize))
			is(prefix+"allocated", fmt.Sprintln(s.AllocatedSectors))
			// The raw bytes come from the file itself.
			is(prefix+"header", string(file[:len(d.HeaderBytes())]))
			is(prefix+"bitmap", string(file[s.BitmapOffset:s.BitmapOffset+d.BitmapLen()]))
			d.Close()
			for file, args := range map[string][]string{"info": {"info", "--json", name}, "map": {"map", "--json", name}} {
				r := moovm(t, dir, args...)
				r.wantStatus(t, 0)
				checked[prefix+file] = true
				g, h := plainJSON(t, value(prefix+file)), plainJSON(t, r.stdout)
				if want["read_only"] == "0" { // how much of the file is written back by then is not said
					g, h = actualSize.ReplaceAllString(g, ""), actualSize.ReplaceAllString(h, "")
				}
				if g != h {
					t.Errorf("%s of %s:\nguest %s\nhost  %s", prefix+file, name, clip(g), clip(h))
				}
			}
		} else {
			// A raw file, of which the program knows only as part of a chain.
			is(prefix+"variant", "raw\n")
			is(prefix+"mtime", "0\n")
			is(prefix+"sector_size", "512\n")
			is(prefix+"header", "")
			is(prefix+"bitmap", "")
			is(prefix+"allocated", fmt.Sprintln(len(file)/512))
			b, err := json.Marshal(l)
			if err != nil {
				t.Fatal(err)
			}
			checked[prefix+"info"], checked[prefix+"map"] = true, true
			if g, h := plainJSON(t, value(prefix+"info")), plainJSON(t, string(b)); g != h {
				t.Errorf("%s: %s in the guest, %s on the host", prefix+"info", g, h)
			}
			var extents []cowdisk.Extent
			if err := json.Unmarshal([]byte(value(prefix+"map")), &extents); err != nil || len(extents) == 0 {
				t.Errorf("%s: %d extents, %v", prefix+"map", len(extents), err)
			}
			var end int64
			for _, e := range extents {
				if e.Start != end || !e.Data || e.Filename != name {
					t.Errorf("%s: %+v", prefix+"map", e)
				}
				end = e.Start + e.Length
			}
			if end != int64(len(file)) {
				t.Errorf("%s ends at %d of %d", prefix+"map", end, len(file))
			}
		}
		checked[prefix+"stats"] = true // moves; looked at by itself
		if i > 0 {
			is(prefix+"stats", "")
		}
	}
	err := filepath.WalkDir(got, func(path string, e fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(got, path); err == nil && !e.IsDir() && !checked[rel] {
			t.Errorf("%s: a file nobody compared", rel)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

func chainInfo(t *testing.T, dir, image string) []cowdisk.Info {
	t.Helper()
	r := moovm(t, dir, "info", "--json", "--chain", image)
	r.wantStatus(t, 0)
	var infos []cowdisk.Info
	if err := json.Unmarshal([]byte(r.stdout), &infos); err != nil {
		t.Fatal(err)
	}
	return infos
}

// plainJSON is JSON without what only the host is told: where its files are.
func plainJSON(t *testing.T, s string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		t.Errorf("%v in %q", err, clip(s))
	}
	var plain func(v any)
	plain = func(v any) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				plain(e)
			}
		case map[string]any:
			delete(v, "full-backing-filename")
			if name, ok := v["filename"].(string); ok {
				v["filename"] = filepath.Base(name)
			}
			for _, e := range v {
				plain(e)
			}
		}
	}
	plain(v)
	b, err := json.Marshal(v)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}

func clip(s string) string {
	if len(s) > 600 {
		return s[:600] + "…"
	}
	return s
}

// shareDirs makes folders in dir to be shared.
func shareDirs(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := os.MkdirAll(filepath.Join(dir, n), 0o777); err != nil {
			t.Fatal(err)
		}
	}
}

// lines are the "name=value" lines of a guest's output.
func lines(s string) map[string]string {
	m := make(map[string]string)
	for _, line := range strings.Split(s, "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			m[k] = v
		}
	}
	return m
}

// Every file of the tree, of a disk that does not change and of one the guest
// has just written to, is what the host sees; standard tools can work on it;
// stats move while writes go on; 16 readers get the same; mount and unmount go
// on and on.
func TestLongTreeInGuest(t *testing.T) {
	long(t)
	needKVM(t)
	treeInGuest(t, 100, 3000)
}

func treeInGuest(t *testing.T, mounts, writes int) {
	dir := folder(t)
	overlay(t, dir)
	dataDisks(t, dir)
	shareDirs(t, dir, "out", "again")
	if err := os.WriteFile(filepath.Join(dir, "again", "file"), bytes.Repeat([]byte("again\n"), 100_000), 0o666); err != nil {
		t.Fatal(err)
	}
	r := moovm(t, dir, runArgs(append([]string{
		"--disk", "top.cow,ro,serial=DATA", "--disk", "scratch.cow", "--share", "out=out,rw", "--share", "again=again",
	}, sh(`
		T=/run/moovm/disks
		cat /run/moovm/version
		at() { read -r up _ < /proc/uptime; echo "$1 at $up s"; }
		at start
		dd if=/dev/urandom of=/dev/vdc bs=8k count=20 seek=300 oflag=direct 2>/dev/null
		at dd
		# by every tool
		cp -a $T/vdb /mnt/out/; at cp
		test "$(readlink $T/by-serial/DATA)" = ../vdb
		ls -lR /run/moovm > /dev/null; at ls
		test "$(find $T/vdb -type f | wc -l)" = $((14*4))
		tar -C $T -cf - vdb | tar -C $T -df -; at tar
		find $T/vdb -type f ! -name stats -exec stat -c '%s %n' {} + | while read -r size name; do
			test "$(wc -c < "$name")" = "$size" || echo "size=$name"
		done; at sizes
		dd if=$T/vdb/bitmap bs=1000 2>/dev/null | cmp - $T/vdb/bitmap
		dd if=$T/vdc/bitmap bs=7 skip=100 count=10 2>/dev/null | cmp -n 70 -i 0:700 - $T/vdc/bitmap
		at tools
		# stats while writes go on
		old=$(grep '^writes ' $T/vdc/stats | cut -d' ' -f2); first=$old; moved=0
		dd if=/dev/zero of=/dev/vdc bs=4k count=`+strconv.Itoa(writes)+` seek=1000 oflag=direct 2>/dev/null &
		while kill -0 $! 2>/dev/null; do
			new=$(grep '^writes ' $T/vdc/stats | cut -d' ' -f2)
			test "$new" -ge "$old" || echo "backwards=$old-$new"
			test "$new" = "$old" || moved=$((moved+1))
			old=$new
		done
		wait $!
		echo "moved=$moved"
		echo "writes=$(($(grep '^writes ' $T/vdc/stats | cut -d' ' -f2) - first))"
		echo "allocated=$(cat $T/vdc/allocated)"
		at stats
		# mtime moves with the contents, and only then
		a=$(stat -c %Y%y $T/vdc/allocated); b=$(stat -c %Y%y $T/vdc/allocated)
		dd if=/dev/urandom of=/dev/vdc bs=4k count=1 seek=9000 oflag=direct 2>/dev/null
		c=$(stat -c %Y%y $T/vdc/allocated)
		test "$a" = "$b" && echo "still=yes"
		test "$b" != "$c" && echo "mtime=moved"
		at mtime
		# 16 readers
		for i in $(seq 16); do
			(cat $T/vdb/bitmap $T/vdb/map $T/vdb/chain/1/info /mnt/again/file | md5sum > /tmp/sum.$i) &
		done
		wait
		echo "readers=$(sort -u /tmp/sum.* | wc -l)"
		at readers
		# mount, remount, unmount
		umount /mnt/again
		n=0
		while [ $n -lt `+strconv.Itoa(mounts)+` ]; do
			mount -t 9p -o trans=virtio,version=9p2000.L,msize=65536 again /mnt/again
			mount -o remount,ro /mnt/again
			test "$(head -c 5 /mnt/again/file)" = again
			umount /mnt/again
			n=$((n+1))
		done
		echo "mounts=$n"; at mounts
		sync /dev/vdc; cp -a $T/vdc /mnt/out/
	`)...)...)...)
	r.wantStatus(t, 0)
	t.Log(r.stdout)
	if !strings.HasPrefix(r.stdout, "moovm ") {
		t.Errorf("version: %s", r.stdout)
	}
	got := lines(r.stdout)
	if got["size"] != "" || got["backwards"] != "" {
		t.Errorf("a wrong size, or counters that go back\n%v", r)
	}
	if n, _ := strconv.Atoi(got["moved"]); n < 3 {
		t.Errorf("stats moved %s times while %d writes went on", got["moved"], writes)
	}
	for k, want := range map[string]string{
		"writes": strconv.Itoa(writes), "allocated": strconv.Itoa(320 + 8*writes),
		"still": "yes", "mtime": "moved", "readers": "1", "mounts": strconv.Itoa(mounts),
	} {
		if got[k] != want {
			t.Errorf("%s is %q, want %q\n%v", k, got[k], want, r)
		}
	}
	wantTree(t, dir, filepath.Join(dir, "out", "vdb"), "top.cow", map[string]string{"serial": "DATA", "read_only": "1"})
	wantTree(t, dir, filepath.Join(dir, "out", "vdc"), "scratch.cow", map[string]string{"read_only": "0"})
	stats, err := os.ReadFile(filepath.Join(dir, "out", "vdc", "stats"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{fmt.Sprint("writes ", 20+writes+1), "errors 0", "in_flight 0"} {
		if !regexp.MustCompile(`(?m)^` + line + `$`).Match(stats) {
			t.Errorf("stats lack %q:\n%s", line, stats)
		}
	}
}
