package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/moovm/moovm/ctl"
)

// numbers is a guest's command that writes 1, 2, 3… to a file and says each
// when it is flushed.
const numbers = `echo hello > /dev/console; i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo $i > /root/n.new; mv /root/n.new /root/n; sync -f /root; echo "n=$i."; done`

// A running machine is asked through its socket, and its disk frozen while it
// writes.
func TestControl(t *testing.T) {
	needKVM(t)
	dir := folder(t)
	moovm(t, dir, "create", "-b", "base.img", "root.cow").wantStatus(t, 0)
	c := start(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--disk", "root.cow", "--control", "unix:vm.sock,dir=.", "--", "sh", "-c", numbers)
	c.expect("n=5.")
	socket := filepath.Join(dir, "vm.sock")
	ask := func(args ...string) result { return moovm(t, dir, append([]string{"ctl", socket}, args...)...) }
	status := func() (s ctl.Status) {
		t.Helper()
		r := ask("status", "--json")
		r.wantStatus(t, 0)
		if err := json.Unmarshal([]byte(r.stdout), &s); err != nil {
			t.Fatalf("%v\n%v", err, r)
		}
		return s
	}
	if s := status(); s.State != "running" || len(s.Disks) != 1 || s.Disks[0].Name != "vda" || filepath.Base(s.Disks[0].Path) != "root.cow" || s.Disks[0].Layers != 2 {
		t.Errorf("status %+v", s)
	}

	// Twice, while it writes.
	said := make([]int, 3)
	for i := range 2 {
		said[i] = lastNumber(t, c.output())
		ask("disk-snapshot", "vda", fmt.Sprintf("root-%d.cow", i+1)).wantStatus(t, 0)
		c.expect(fmt.Sprintf("n=%d.", lastNumber(t, c.output())+3))
	}
	if s := status(); len(s.Disks) != 1 || filepath.Base(s.Disks[0].Path) != "root-2.cow" || s.Disks[0].Layers != 4 {
		t.Errorf("status %+v", s)
	}

	// Paused, nothing goes on.
	ask("pause").wantStatus(t, 0)
	if s := status(); s.State != "paused" {
		t.Errorf("status %+v", s)
	}
	before := lastNumber(t, c.output())
	ask("metrics").wantStatus(t, 0)
	if after := lastNumber(t, c.output()); after > before+1 { // one may have been on its way
		t.Errorf("a paused guest went on from %d to %d", before, after)
	}
	ask("resume").wantStatus(t, 0)
	c.expect(fmt.Sprintf("n=%d.", before+3))

	if r := ask("console"); r.status != 0 || !strings.Contains(r.stdout, "hello") {
		t.Errorf("the console: %v", r)
	}
	for args, want := range map[string]string{
		"disk-snapshot vdb x.cow": "vdb", "disk-snapshot vda ../x.cow": "not below", "disk-snapshot vda root-1.cow": "exists",
		"disk-snapshot vda": "new.cow", "dance": "dance",
	} {
		if r := ask(strings.Fields(args)...); r.status == 0 || !strings.Contains(r.stderr, want) {
			t.Errorf("%s: %v", args, r)
		}
	}
	ask("stop").wantStatus(t, 0)
	if got := c.wait(); got != 0 {
		t.Errorf("exit status %d", got)
	}

	// What was frozen has all that was flushed before, in a file system that a
	// power cut could have left.
	said[2] = lastNumber(t, c.output())
	for i, image := range []string{"root.cow", "root-1.cow", "root-2.cow"} {
		moovm(t, dir, "check", image).wantStatus(t, 0)
		r := moovm(t, dir, "run", "--kernel", kernel, "--accel", "kvm", "--base", image, "--", "cat", "/root/n")
		r.wantStatus(t, 0)
		if n, err := strconv.Atoi(strings.TrimSpace(r.stdout)); err != nil || n < said[i] {
			t.Errorf("%s has number %q, and %d was flushed before", image, r.stdout, said[i])
		}
	}
}

// lastNumber is the last one that the guest said.
func lastNumber(t *testing.T, output string) int {
	t.Helper()
	end := strings.LastIndex(output, ".")
	at := strings.LastIndex(output[:max(end, 0)], "n=")
	if at < 0 {
		t.Fatalf("no number in %q", output)
	}
	n, err := strconv.Atoi(output[at+2 : end])
	if err != nil {
		t.Fatal(err)
	}
	return n
}
