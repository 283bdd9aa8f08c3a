package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moovm/moovm/guest"
	"github.com/moovm/moovm/guest/control"
	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/initramfs"
)

// makeTree fills dir with files of many sizes, modes and ages, some links and
// one long name, the same ones each time.
func makeTree(t *testing.T, dir string, files int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(7, 9))
	for i := range files {
		sub := filepath.Join(dir, fmt.Sprintf("d%d/e%d", i/100%10, i/1000))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		name := filepath.Join(sub, "file-"+strconv.Itoa(i))
		size := rng.IntN(3000)
		switch i % 100 {
		case 0:
			size = 100_000 + rng.IntN(300_000)
		case 1:
			size = 0
		case 2:
			if err := os.Symlink("file-"+strconv.Itoa(i-1), name); err != nil {
				t.Fatal(err)
			}
			continue
		case 3:
			name = filepath.Join(sub, strings.Repeat("ñ", 120)+strconv.Itoa(i))
		}
		b := make([]byte, size)
		for j := range b {
			b[j] = byte(rng.Uint32())
		}
		if err := os.WriteFile(name, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, []fs.FileMode{0o644, 0o755, 0o600, 0o444}[i%4]); err != nil {
			t.Fatal(err)
		}
		when := time.Unix(1_500_000_000+int64(i)*1000, int64(i)*1000)
		if err := os.Chtimes(name, when, when); err != nil {
			t.Fatal(err)
		}
	}
}

// sameTree fails unless got holds the files of want: contents, modes, times.
// These to the second: Linux's 9P client cuts off the rest of a time that it
// sets; a folder that QEMU shares shows the same.
func sameTree(t *testing.T, want, got string) {
	t.Helper()
	list := func(root string) map[string]string {
		m := make(map[string]string)
		err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, _ := filepath.Rel(root, path)
			i, err := e.Info()
			if err != nil {
				return err
			}
			switch {
			case e.IsDir():
				m[rel] = i.Mode().String()
			case i.Mode().Type() == fs.ModeSymlink:
				m[rel], err = os.Readlink(path)
			default:
				var b []byte
				b, err = os.ReadFile(path)
				m[rel] = fmt.Sprintln(i.Mode(), i.ModTime().Unix(), sha256Text(string(b)))
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		return m
	}
	w, g := list(want), list(got)
	bad := 0
	for name, v := range w {
		if g[name] != v {
			if bad++; bad < 10 {
				t.Errorf("%s: %q, want %q", name, g[name], v)
			}
		}
	}
	if len(w) != len(g) || bad > 0 {
		t.Errorf("%d files, want %d; %d differ", len(g), len(w), bad)
	}
}

// A file tree goes through a share into the guest and through another back
// out, and is what it was. $MOOVM_SHARE_FILES is another number of files.
func TestLongShareCopies(t *testing.T) {
	long(t)
	needKVM(t)
	files := 10_000
	if n, err := strconv.Atoi(os.Getenv("MOOVM_SHARE_FILES")); err == nil {
		files = n
	}
	dir := folder(t)
	shareDirs(t, dir, "in", "out")
	makeTree(t, filepath.Join(dir, "in"), files)
	r := moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--memory", "1G",
		"--share", "in=in", "--share", "out=out,rw", "--", "sh", "-ec", `
		at() { read -r up _ < /proc/uptime; echo "$1 at $up s"; }
		mkdir /dev/shm/t; cp -a /mnt/in /dev/shm/t/; at in
		cp -a /dev/shm/t/in /mnt/out/; at out
		umount /mnt/out; at unmounted
	`)
	r.wantStatus(t, 0)
	t.Log(r.stdout)
	if strings.Contains(r.stderr, "cp: ") { // of extended attributes, say
		t.Error(r.stderr)
	}
	sameTree(t, filepath.Join(dir, "in"), filepath.Join(dir, "out", "in"))
}

// inHost is a script that runs in the guest with the host's programs: its root
// through a share, read-only, with the guest's own /dev, /proc and /tmp, and
// the share rw at /mnt.
func inHost(script string) []string {
	return []string{"--share", "host=/", "--share", "work=work,rw", "--", "sh", "-ec", `
		H=/mnt/host; umount $H
		mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro host $H
		mount --rbind /dev $H/dev; mount -t proc proc $H/proc; mount -t tmpfs tmp $H/tmp; mount --bind /mnt/work $H/mnt
		mount --rbind /run $H/run
		at() { read -r up _ < /proc/uptime; echo "$1 at $up s"; }
		` + script}
}

// A clone by git and a build by go, of the host, on a writable share, which
// holds the build cache as well. $MOOVM_E2E_GOCACHE may name a cache to begin
// with (GOCACHE=DIR CGO_ENABLED=0 go build runtime): in the sandbox compiling
// the runtime takes longer than all the rest.
func TestLongShareBuild(t *testing.T) {
	long(t)
	needKVM(t)
	goroot, err := execOutput("go", "env", "GOROOT")
	if err != nil {
		t.Skipf("needs go on this machine (%v); install it", err)
	}
	goroot = strings.TrimSpace(goroot)
	if _, err := exec.LookPath("git"); err != nil {
		t.Skip("needs git on this machine; install it")
	}
	dir := folder(t)
	shareDirs(t, dir, "work/origin/greet")
	if seed := os.Getenv("MOOVM_E2E_GOCACHE"); seed != "" {
		if err := os.CopyFS(filepath.Join(dir, "work/cache"), os.DirFS(seed)); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"go.mod":         "module example.org/hello\n\ngo 1.26\n",
		"main.go":        "package main\n\nimport \"example.org/hello/greet\"\n\nfunc main() { println(greet.Text()) }\n",
		"greet/greet.go": "package greet\n\nfunc Text() string { return \"built in the guest\" }\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, "work/origin", name), []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := execOutput("sh", "-ec", `cd "$0"; git init -q; git add .; git -c user.name=a -c user.email=a@example.org commit -qm one`,
		filepath.Join(dir, "work/origin")); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := command(ctx, dir, append([]string{"run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--memory", "2G", "--cpus", "2"}, inHost(`
		chroot $H env -i PATH=`+goroot+`/bin:/usr/bin:/bin HOME=/tmp GOTOOLCHAIN=local GOPROXY=off GOFLAGS=-buildvcs=false CGO_ENABLED=0 \
			GOCACHE=/mnt/cache GOTMPDIR=/mnt GOTELEMETRY=off sh -ec '
			at() { read -r up _ < /proc/uptime; echo "$1 at $up s"; }
			at start; cd /mnt; git clone -q origin clone; at cloned
			cd clone; test -z "$(git status --porcelain)"; at checked
			go build -o hello .; at built
			./hello 2>&1
			echo changed >> main.go; git diff --stat | tail -1
			git -c user.name=a -c user.email=a@example.org commit -qam two; git log --oneline | wc -l
			git gc -q; git fsck --no-progress; at gc
		'
	`)...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out.String(), errs.String())
	}
	t.Log(out.String())
	for _, want := range []string{"built in the guest\n", "1 file changed, 1 insertion", "\n2\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the guest did not say %q:\n%s%s", want, out.String(), errs.String())
		}
	}
	// The host takes the clone for what it is.
	if s, err := execOutput("git", "-C", filepath.Join(dir, "work/clone"), "-c", "safe.directory=*", "status", "--porcelain"); err != nil || s != "?? hello\n" {
		t.Errorf("git status on the host: %q, %v", s, err)
	}
	if s, err := execOutput(filepath.Join(dir, "work/clone/hello")); err != nil || s != "built in the guest\n" {
		t.Errorf("the program on the host: %q, %v", s, err)
	}
}

// fio and jq of the host on the live bitmap and map.
func TestLongTreeFio(t *testing.T) {
	long(t)
	needKVM(t)
	for _, p := range []string{"fio", "jq"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s on this machine; install it", p)
		}
	}
	dir := folder(t)
	dataDisks(t, dir)
	overlay(t, dir)
	shareDirs(t, dir, "work")
	r := moovm(t, dir, runArgs(append([]string{"--disk", "top.cow,ro", "--disk", "scratch.cow"}, inHost(`
		chroot $H sh -ec '
			at() { read -r up _ < /proc/uptime; echo "$1 at $up s"; }
			cd /run/moovm/disks
			fio --name=b --filename=vdc/bitmap --readonly --rw=randread --bs=512 --size=16k --loops=20 --output-format=json > /mnt/fio.json; at fio
			jq ".jobs[0].read.total_ios, .jobs[0].error" /mnt/fio.json
			jq -r .format vdb/info; jq length vdb/map
			# stats move while fio writes
			old=$(grep "^writes " vdc/stats | cut -d" " -f2); moved=0
			fio --name=w --filename=/dev/vdc --rw=randwrite --bs=4k --size=16m --direct=1 --fsync=50 > /mnt/fio2 2>&1 &
			while kill -0 $! 2>/dev/null; do
				new=$(grep "^writes " vdc/stats | cut -d" " -f2)
				test "$new" -ge "$old" || echo "backwards=$old-$new"
				test "$new" = "$old" || moved=$((moved+1))
				old=$new
			done
			wait $!
			echo moved=$moved; at writes
			tail -n1 vdc/stats; cp vdc/bitmap vdc/map /mnt/
		'
	`)...)...)...)
	r.wantStatus(t, 0)
	t.Log(r.stdout)
	if !strings.Contains(r.stdout, "\n640\n0\ncow\n") {
		t.Errorf("fio read something else\n%v", r)
	}
	if n, _ := strconv.Atoi(lines(r.stdout)["moved"]); n < 3 || strings.Contains(r.stdout, "backwards") {
		t.Errorf("stats moved %d times while fio wrote\n%v", n, r)
	}
	// What the guest saw at the end is in the file now.
	h := moovm(t, dir, "map", "--json", "scratch.cow")
	h.wantStatus(t, 0)
	if g, err := os.ReadFile(filepath.Join(dir, "work/map")); err != nil || plainJSON(t, string(g)) != plainJSON(t, h.stdout) {
		t.Errorf("the map: %v", err)
	}
}

// shareHook is for guests that run this test binary instead of its tests.
func shareHook() {
	if os.Getpid() == 1 {
		speedInit() // a guest of TestLongShareSpeed
	}
	if dir := os.Getenv("MOOVM_E2E_LOAD"); dir != "" {
		shareLoad(dir) // a guest of TestShareGuestEnds
	}
}

// shareLoad is what a guest does to a share when its end comes: it reads and
// writes in many threads until it is stopped.
func shareLoad(dir string) {
	fail := make(chan error)
	busy := make(chan struct{}, 100)
	for i := range 8 {
		go func() {
			name := filepath.Join(dir, "w"+strconv.Itoa(i))
			b := make([]byte, 300_000)
			for n := 0; ; n++ {
				if err := os.WriteFile(name, b, 0o666); err != nil {
					fail <- err
				}
				if _, err := os.ReadFile(filepath.Join(dir, "big")); err != nil {
					fail <- err
				}
				if f, err := os.Open(name); err != nil { // never closed
					fail <- err
				} else if n > 3 {
					f.Close()
				}
				busy <- struct{}{}
			}
		}()
	}
	for n := 0; ; n++ {
		select {
		case err := <-fail:
			fmt.Println("load:", err)
			os.Exit(3)
		case <-busy:
		}
		if n == 10 {
			fmt.Println("load: under way")
			switch os.Getenv("MOOVM_E2E_END") {
			case "reset":
				os.WriteFile("/proc/sysrq-trigger", []byte("b"), 0)
			case "panic":
				os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
			case "exit": // with open files; the init unmounts and powers off
				os.Exit(0)
			}
		}
	}
}

// However a guest ends in the middle of requests, with files open, nothing of
// it is left in the host's process.
func TestShareGuestEnds(t *testing.T) {
	needKVM(t)
	k, modules := kernelWithModules(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// What the runtime opens once, with the first pipe, does not count.
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	for _, end := range []string{"kill", "reset", "exit"} {
		t.Run(end, func(t *testing.T) {
			before, goroutines := openFiles(t), goleak.IgnoreCurrent()
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "big"), make([]byte, 3<<20), 0o666); err != nil {
				t.Fatal(err)
			}
			share, err := sharefs.New(dir, sharefs.Options{Writable: true})
			if err != nil {
				t.Fatal(err)
			}
			ctx, kill := context.WithTimeout(t.Context(), patience)
			defer kill()
			out := &trigger{text: "under way"}
			if end == "kill" {
				out.then = kill
			}
			res, err := guest.Boot(ctx, guest.Config{
				Kernel: k, Modules: modules, Init: moovmBin, NoTree: true, Memory: 512 << 20,
				Files:  []initramfs.File{{Name: "/e2e", HostPath: self, Mode: 0o755}},
				Shares: []guest.Share{{Tag: "load", Attacher: share, Target: "/mnt/load"}},
				Command: &control.Command{Args: []string{"/e2e"},
					Env: []string{"MOOVM_E2E_LOAD=/mnt/load", "MOOVM_E2E_END=" + end}},
				Stdout: out, Stderr: out,
			})
			// What the guest says just before it resets may not reach us.
			reset := end == "reset" && err != nil && strings.Contains(err.Error(), "sysrq: Resetting")
			if !out.seen() && !reset {
				t.Fatalf("the guest did not come so far: %v\n%s", err, out.b.String())
			}
			var stopped *guest.StoppedError
			switch {
			case end == "kill" && !errors.As(err, &stopped):
				t.Errorf("killed: %v", err)
			case end == "reset" && !errors.Is(err, guest.ErrCutShort):
				t.Errorf("reset: %v", err)
			case end == "exit" && (err != nil || res.ExitStatus != 0):
				t.Errorf("exit: status %d, %v\n%s", res.ExitStatus, err, out.b.String())
			}
			if n := openFiles(t); n > before+1 { // the share's folder
				t.Errorf("%d descriptors before, %d while only the share is open", before, n)
			}
			if err := share.Close(); err != nil {
				t.Error(err)
			}
			if n := openFiles(t); n != before {
				t.Errorf("%d descriptors before, %d after", before, n)
			}
			if err := goleak.Find(goroutines); err != nil {
				t.Error(err)
			}
		})
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// trigger is a writer that does something once when a text has come by.
type trigger struct {
	text string
	then func()
	b    bytes.Buffer // written from one goroutine
	done bool
}

var _ io.Writer = (*trigger)(nil)

func (w *trigger) Write(p []byte) (int, error) {
	w.b.Write(p)
	if !w.done && w.seen() {
		w.done = true
		if w.then != nil {
			w.then()
		}
	}
	return len(p), nil
}

func (w *trigger) seen() bool { return strings.Contains(w.b.String(), w.text) }
