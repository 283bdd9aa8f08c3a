package e2e

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/moovm/moovm/oci"
	"github.com/moovm/moovm/oci/ocitest"
)

// listing says of each file below /data its type, mode, owner, links, size and
// name, and then the sums of the plain ones.
const listing = `cd /data; find . | sort | while IFS= read -r f; do stat -c '%F %a %u %g %h %s' "$f"; echo "$f"; done
find . -type f | sort | while IFS= read -r f; do sha256sum < "$f"; done`

// A container image of twenty layers is a root disk that Linux takes, with its
// command, environment, folder and user; its files are the layers'.
func TestImage(t *testing.T) {
	needKVM(t)
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Skipf("needs a static busybox: install busybox-static (%v)", err)
	}
	dir := t.TempDir()
	long := strings.Repeat("n", 251) + ".txt"
	program := ocitest.File("bin/busybox", string(busybox))
	program.Mode = 0o755
	setuid := ocitest.File("data/setuid", "x")
	setuid.Mode = 0o4755
	owned := ocitest.File("data/owned", "o")
	owned.Uid, owned.Gid = 1000, 1001
	first := []ocitest.Entry{ocitest.Dir("bin/"), program}
	for _, name := range []string{"sh", "id", "pwd", "stat", "find", "sort", "sha256sum", "cat", "echo", "env"} {
		first = append(first, ocitest.Symlink("bin/"+name, "busybox"))
	}
	layers := [][]byte{
		ocitest.Tar(t, append(first, ocitest.Dir("etc/"),
			ocitest.File("etc/passwd", "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n"), ocitest.File("etc/group", "app:x:1001:\nextra:x:1002:app\n"),
			ocitest.Dir("data/"), ocitest.Dir("data/gone/"), ocitest.File("data/gone/file", "1"), ocitest.Dir("data/opaque/"), ocitest.File("data/opaque/old", "1"),
			ocitest.File("data/removed", "1"), ocitest.File("data/changed", "old"), ocitest.File("data/first", "linked"))...),
		ocitest.Tar(t, ocitest.File("data/.wh.gone", ""), ocitest.File("data/.wh.removed", ""), ocitest.File("data/changed", "new")),
		ocitest.Tar(t, ocitest.Dir("data/opaque/"), ocitest.File("data/opaque/.wh..wh..opq", ""), ocitest.File("data/opaque/new", "2")),
		ocitest.Tar(t, ocitest.Link("data/second", "data/first"), ocitest.Symlink("data/symlink", "first"), setuid, owned),
		ocitest.Tar(t, ocitest.File("data/"+long, "long"), ocitest.File("data/b\xff\xfe", "bytes"), ocitest.File("data/empty", "")),
	}
	big := strings.Repeat("0123456789abcdef", 300_000) // 4.8 MB
	for i := len(layers); i < 20; i++ {
		layers = append(layers, ocitest.Tar(t, ocitest.File(fmt.Sprintf("data/layer%02d", i), fmt.Sprint(i)), ocitest.File("data/big", big[:i*100_000])))
	}
	image := ocitest.Archive(t, ocitest.Folder(t, ocitest.Image(t, v1.Config{
		Entrypoint: []string{"/bin/busybox", "env"}, Cmd: []string{"nothing"}, Env: []string{"PATH=/bin", "FROM_IMAGE=yes no"}, WorkingDir: "/data/opaque", User: "app",
	}, layers...)))

	t.Setenv("MOOVM_CACHE", filepath.Join(dir, "cache"))
	run := func(args ...string) string {
		t.Helper()
		r := moovm(t, dir, append([]string{"run", "--kernel", kernel, "--accel", "kvm", "--image", image, "--"}, args...)...)
		r.wantStatus(t, 0)
		return r.stdout
	}
	got := run("sh", "-c", "pwd; id; echo $HOME; exec busybox sh -c '"+strings.ReplaceAll(listing, "'", `'\''`)+"'")
	env, rest, _ := strings.Cut(got, "/data/opaque\n")
	if env != "" { // the entrypoint runs the command
		t.Errorf("in front of the command: %q", env)
	}
	who, files, _ := strings.Cut(rest, "\n/home/app\n")
	if who != "uid=1000(app) gid=1001(app) groups=1001(app),1002(extra)" {
		t.Errorf("the command runs as %q", who)
	}
	sum := func(s string) string { return fmt.Sprintf("%x  -", sha256.Sum256([]byte(s))) }
	for _, want := range []string{
		"regular file 644 0 0 1 3\n./changed\n", "regular file 644 0 0 2 6\n./first\n", "regular file 644 0 0 2 6\n./second\n", "symbolic link 777 0 0 1 5\n./symlink\n",
		"regular file 4755 0 0 1 1\n./setuid\n", "regular file 644 1000 1001 1 1\n./owned\n", "./" + long + "\n", "./b\xff\xfe\n", "regular empty file 644 0 0 1 0\n./empty\n",
		"./opaque/new\n", "./layer19\n", "regular file 644 0 0 1 1900000\n./big\n", sum(big[:1_900_000]), sum("new"), sum("bytes"), sum("linked"),
	} {
		if !strings.Contains(files, want) {
			t.Errorf("the guest's files lack %q", want)
		}
	}
	for _, gone := range []string{"./gone", "./removed", "./opaque/old", ".wh."} {
		if strings.Contains(files, gone) {
			t.Errorf("the guest has %q", gone)
		}
	}
	if t.Failed() {
		t.Logf("the guest said\n%s", got)
	}
	if out := run("FROM=args", "busybox", "sh", "-c", "echo $FROM_IMAGE, $FROM"); out != "yes no, args\n" {
		t.Errorf("the environment: %q", out)
	}
	// The same disk again, and an ordinary base.
	r := moovm(t, dir, "pull", "--json", image)
	r.wantStatus(t, 0)
	var root oci.Root
	if err := json.Unmarshal([]byte(r.stdout), &root); err != nil || !root.Cached {
		t.Fatalf("%+v, %v", root, err)
	}
	moovm(t, dir, "create", "-b", root.Path+",format=raw", "--backing-root", filepath.Dir(root.Path), "root.cow").wantStatus(t, 0)
	r = moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--backing-root", filepath.Dir(root.Path), "--disk", "root.cow", "--", "/bin/sh", "-c", "echo kept > /data/kept; cat /data/changed")
	if r.status != 0 || r.stdout != "new" {
		t.Errorf("an overlay on it: %v", r)
	}
}
