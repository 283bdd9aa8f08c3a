package e2e

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moovm/moovm/guest/guesttest"
)

// forkGuest is a Machine of the test with the means to talk to it.
type forkGuest struct {
	t *testing.T
	*guesttest.Machine
	name string
}

func (g forkGuest) sh(script string) string {
	g.t.Helper()
	r, err := g.Run(g.t.Context(), "sh", "-ec", script)
	if err != nil || r.Status != 0 {
		g.t.Fatalf("%s: %s: status %d, %v\n%s%s", g.name, script, r.Status, err, r.Stdout, r.Stderr)
	}
	return strings.TrimSpace(r.Stdout)
}

// TestForkGuest forks and rewinds whole guests: with disks and a file system in
// use, a command that runs on, twins that know that they are not the same, and
// a clock that is the host's. A guest comes back from a kernel panic and from a
// power cut without a boot.
func TestForkGuest(t *testing.T) {
	needKVM(t)
	parent := forkGuest{t, guesttest.Start(t, guesttest.Config{
		Kernels: []string{kernel}, Memory: 512 << 20, CPUs: 1, Env: []string{"GREETING=hello"},
		Disks: []guesttest.Disk{{Size: 64 << 20}, {Size: 16 << 20, VolatileCache: true}},
	}), "parent"}
	clean := parent.Snapshot() // nothing mounted
	parent.sh("mke2fs -q -t ext4 /dev/vda; mkdir /tmp/fs; mount -t ext4 /dev/vda /tmp/fs; echo parent >/tmp/fs/who; echo memory >/tmp/memory")
	// A command that stands in the middle of the fork, with its input open.
	stdin, feed := io.Pipe()
	defer feed.Close()
	var said bytes.Buffer
	running := make(chan error, 1)
	go func() {
		_, err := parent.RunWith(t.Context(), guesttest.Streams{Stdin: stdin, Stdout: &said}, "sh", "-c", "echo $$ >/tmp/pid; read x; echo got $x")
		running <- err
	}()
	parent.sh("while [ ! -s /tmp/pid ]; do sleep 0.05; done")
	busy := parent.Snapshot()
	parent.sh("echo later >/tmp/fs/who; sync")

	uuids := map[string]string{}
	check := func(g forkGuest) {
		t.Helper()
		if got := g.sh("cat /tmp/fs/who /tmp/memory; echo $GREETING"); got != "parent\nmemory\nhello" {
			t.Errorf("%s has %q", g.name, got)
		}
		uuid := g.sh("cat /proc/sys/kernel/random/uuid")
		if who, twice := uuids[uuid]; twice || uuid == "" {
			t.Errorf("%s has the UUID %q of %s", g.name, uuid, who)
		}
		uuids[uuid] = g.name
		g.sh(fmt.Sprintf("echo %s >/tmp/fs/who; echo %[1]s >/tmp/memory; sync; [ $(cat /tmp/fs/who) = %[1]s ]", g.name))
	}
	var all []forkGuest
	for i := range 2 {
		all = append(all, forkGuest{t, busy.Fork(t), fmt.Sprint("child", i)})
	}
	for _, g := range all {
		check(g)
	}
	// A child of a child, with what that one has written.
	grandchild := forkGuest{t, all[0].Fork(t), "grandchild"}
	if got := grandchild.sh("cat /tmp/fs/who /tmp/memory"); got != "child0\nchild0" {
		t.Errorf("the grandchild has %q", got)
	}
	// Rewound, and once more after its kernel has panicked.
	for i := range 2 {
		all[1].Rewind(busy)
		all[1].name = fmt.Sprint("rewound", i)
		check(all[1])
		if i == 0 {
			if _, err := all[1].Run(t.Context(), "sh", "-c", "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 100"); err == nil || !strings.Contains(err.Error(), "panic") {
				t.Errorf("after a panic: %v", err)
			}
		}
	}
	// The parent knows nothing of all that, and its command goes on.
	if got := parent.sh("cat /tmp/fs/who /tmp/memory"); got != "later\nmemory" {
		t.Errorf("the parent has %q", got)
	}
	fmt.Fprintln(feed, "an answer")
	if err := <-running; err != nil || said.String() != "got an answer\n" {
		t.Errorf("the parent's command said %q, %v", said.String(), err)
	}
	// The power goes; the disk has what was synced, the memory what the first
	// snapshot had.
	all[0].sh("echo synced >/tmp/fs/who; sync")
	all[0].Kill()
	all[0].ResetTo(clean)
	if got := all[0].sh("[ ! -e /tmp/memory ]; mkdir /tmp/fs; mount -t ext4 /dev/vda /tmp/fs; cat /tmp/fs/who"); got != "synced" {
		t.Errorf("after the power cut the disk has %q", got)
	}
	// The host's clock.
	if now := time.Now().Unix(); !closeTo(t, all[0].sh("date +%s"), now) {
		t.Errorf("the clock is off: host %d", now)
	}
	for _, g := range append(all, grandchild, parent) {
		g.sh("umount /tmp/fs")
		image := filepath.Join(t.TempDir(), "disk")
		if err := g.Disk(0).Flatten(t.Context(), image); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("e2fsck", "-fn", image).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", g.name, err, out)
		}
		os.Remove(image)
	}
}

// closeTo says whether a time in seconds is within a minute of another.
func closeTo(t *testing.T, text string, now int64) bool {
	t.Helper()
	var n int64
	if _, err := fmt.Sscan(text, &n); err != nil {
		t.Fatal(err)
	}
	return n > now-60 && n < now+60
}
