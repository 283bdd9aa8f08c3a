//go:build linux

package sharefs_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/moovm/moovm/guest/sharefs"
	"github.com/moovm/moovm/virtio9p/virtio9ptest"
)

func shell(t *testing.T, dir, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-euxc", script)
	cmd.Dir = dir
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v\n%s", err, stderr.String()[max(0, stderr.Len()-2000):])
	}
	return stdout.String()
}

// What people do in a folder, by a Linux kernel's client.
func TestLinuxClient(t *testing.T) {
	dir := t.TempDir()
	mnt := virtio9ptest.Mount(t, share(t, dir, rw))
	for _, script := range []string{
		`mkdir -p a/b/c`,
		`echo hello > a/f; cat a/f >/dev/null`,
		`echo more >> a/f`,
		`test "$(cat a/f)" = "$(printf 'hello\nmore')"`,
		`ln -s ../f a/b/link; ln a/f a/hard`,
		`test "$(stat -c %h a/f)" = 2`,
		`test "$(cat a/b/link)" = "$(cat a/f)"`,
		`chmod 640 a/f; test "$(stat -c %a a/hard)" = 640`,
		`touch -d '2001-02-03 04:05:06' a/f; test "$(stat -c %Y a/f)" = "$(date -d '2001-02-03 04:05:06' +%s)"`,
		`cp -a a copy; diff -r a copy`,
		`mv copy moved; rm -r a; mv moved a`,
		`dd if=/dev/urandom of=big bs=1M count=1 conv=fsync status=none`,
		`cp big big2; cmp big big2; truncate -s 5 big2; test "$(stat -c %s big2)" = 5`,
		`mkfifo fifo; (echo through > fifo &) ; test "$(cat fifo)" = through`,
		`flock big true; flock -s big true`,
		`i=0; while [ $i -lt 20 ]; do echo $i > a/b/c/$i; i=$((i+1)); done`,
		`test "$(ls a/b/c | wc -l)" = 20`,
		`test "$(find . -type f | wc -l)" = 24`,
		`tar cf ../all.tar . ; tar df ../all.tar; rm ../all.tar`,
		`test "$(ls -a /proc/self/cwd/ | wc -l)" -ge 4`,
		`df . >/dev/null; sync -f .`,
		`mkdir t; cd t; mv ../a/b .; if rmdir ../a 2>/dev/null; then exit 1; fi`,
		`rm -rf t/b/c`,
	} {
		shell(t, mnt, script)
	}
	if _, err := os.Stat(dir + "/t/b/link"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link should lead nowhere now: %v", err)
	}
	if got, want := shell(t, dir, "sha256sum < big"), shell(t, mnt, "sha256sum < big"); got != want {
		t.Errorf("big differs: %s, %s", got, want)
	}
	if out := shell(t, mnt, "(chown 4711 big 2>&1 || true); (mknod n c 1 3 2>&1 || true); (cat < ../../../etc/passwd | head -c1)"); out == "" {
		t.Error("nothing said")
	}
	for range 5 {
		shell(t, mnt, "test $(stat -c %o .) -ge 65536; ls -lR . >/dev/null; echo x > churn; mv churn churn2; rm churn2")
	}
}

func TestLinuxClientReadOnly(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/f", "text")
	mnt := virtio9ptest.Mount(t, share(t, dir, sharefs.Options{}))
	if err := os.WriteFile(mnt+"/f", nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
	if err := os.Mkdir(mnt+"/d", 0o755); !errors.Is(err, unix.EROFS) {
		t.Errorf("mkdir: %v", err)
	}
	if err := os.Remove(mnt + "/f"); !errors.Is(err, unix.EROFS) {
		t.Errorf("remove: %v", err)
	}
	if b, err := os.ReadFile(mnt + "/f"); string(b) != "text" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// Round trips and throughput of a kernel's client on this machine.
func BenchmarkLinuxClient(b *testing.B) {
	dir := b.TempDir()
	write(b, dir+"/f", strings.Repeat("x", 4<<20))
	mnt := virtio9ptest.Mount(b, share(b, dir, sharefs.Options{}))
	b.Run("stat", func(b *testing.B) {
		for b.Loop() {
			if _, err := os.Stat(mnt + "/f"); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("read", func(b *testing.B) {
		b.SetBytes(4 << 20)
		for b.Loop() {
			if _, err := os.ReadFile(mnt + "/f"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
