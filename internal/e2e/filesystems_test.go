package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// needTools is the image with tools for guests; it skips the test without one.
func needTools(t *testing.T) string {
	t.Helper()
	tools := os.Getenv("MOOVM_TOOLS")
	if tools == "" {
		t.Skip("needs MOOVM_TOOLS, the image that scripts/build-tools.sh makes; `make test-e2e` sets it")
	}
	return tools
}

// fileSystemsScript runs in the guest: vda is the root, vdb is for btrfs, vdc for
// xfs, vdd to vdf are for a RAID; vdg has the tools. FILES is how much each of
// the four writers does.
const fileSystemsScript = `
set -e
step() { echo "$* after $(cut -d" " -f1 /proc/uptime) s" >&2; }
mkdir /tools /x
mount -o ro /dev/vdg /tools
for d in dev proc sys run; do mount --rbind /$d /tools/$d; done
tool() { chroot /tools "$@" > /tool.out 2>&1 || { echo "$*: status $?"; cat /tool.out; exit 1; }; }

# writer N: what it leaves has its sums in /sums.N; it says so.
writer() {
	local d=/x/$1 i
	mkdir $d
	for i in $(seq $FILES); do
		head -c $((RANDOM * 4)) /dev/urandom > $d/$i
		[ $((i % 3)) != 0 ] || { rm -f $d/$((i - 1)); ln $d/$i $d/linked-$i; }
		[ $((i % 4)) != 0 ] || { mv $d/$i $d/moved-$i; truncate -s $((RANDOM * 2)) $d/moved-$i; dd if=/dev/urandom of=$d/moved-$i bs=4k seek=$((RANDOM % 64)) count=3 conv=notrunc,fsync 2>/dev/null; }
	done
	(cd /x && find $1 -type f -exec md5sum {} +) > /sums.$1
	echo "writer $1 on $2"
}

# stress NAME DEVICE: four writers at once, then all that they wrote is there.
stress() {
	mount $2 /x
	local pids= w
	for w in 1 2 3 4; do writer $w $1 & pids="$pids $!"; done
	[ -z "$DURING" ] || tool $DURING
	for w in $pids; do wait $w; done
	umount /x
	mount $2 /x
	for w in 1 2 3 4; do (cd /x && md5sum -c --quiet /sums.$w); done
	[ "$(find /x -type f | wc -l)" -ge "$(cat /sums.? | wc -l)" ]
	umount /x
	echo "$1: whole"
	step $1
}

tool mkfs.btrfs -q /dev/vdb
stress btrfs /dev/vdb
tool btrfs check /dev/vdb
echo "btrfs check: clean"

tool mkfs.xfs -q /dev/vdc
stress xfs /dev/vdc
tool xfs_repair -n /dev/vdc
echo "xfs_repair -n: clean"

export MDADM_NO_UDEV=1
tool mdadm --create /dev/md0 --run --assume-clean --metadata=1.2 --level=5 --chunk=64 --raid-devices=3 /dev/vdd /dev/vde /dev/vdf
mkfs.ext4 -q -F /dev/md0
DURING="mdadm /dev/md0 --fail /dev/vde" stress raid5 /dev/md0
echo "raid: $(cat /sys/block/md0/md/degraded) of $(cat /sys/block/md0/md/raid_disks) failed"
tool mdadm /dev/md0 --remove /dev/vde
dd if=/dev/zero of=/dev/vde bs=1M count=1 oflag=direct 2>/dev/null
tool mdadm /dev/md0 --add /dev/vde
until [ "$(cat /sys/block/md0/md/degraded)" = 0 ]; do sleep 0.2; done
echo "raid: $(cat /sys/block/md0/md/degraded) of $(cat /sys/block/md0/md/raid_disks) failed"
tool mdadm /dev/md0 --fail /dev/vdd # what was rebuilt counts now
e2fsck -fn /dev/md0 > /tool.out 2>&1 || { cat /tool.out; exit 1; }
mount /dev/md0 /x
for w in 1 2 3 4; do (cd /x && md5sum -c --quiet /sums.$w); done
umount /x
echo "raid5: rebuilt"
tool mdadm --stop /dev/md0
step raid5
if dmesg | grep -E "BUG:|Oops|WARNING:|invalid opcode|Call Trace|I/O error|corrupt"; then exit 1; fi
echo "kernel: content"
`

// File systems with modules of their own, and a RAID that loses a disk, on
// overlays: what four writers at once wrote is there, their checkers find
// nothing, and the kernel has nothing to say.
func TestFileSystems(t *testing.T) { fileSystems(t, "12") }

func TestLongFileSystems(t *testing.T) {
	long(t)
	fileSystems(t, "400")
}

func fileSystems(t *testing.T, files string) {
	needKVM(t)
	tools := needTools(t)
	dir := folder(t)
	args := []string{"run", "--kernel", kernel, "--accel", "kvm", "--base", "base.img", "--memory", "1G"}
	before := map[string]string{}
	for name, size := range map[string]int64{"vdb": 512 << 20, "vdc": 512 << 20, "vdd": 256 << 20, "vde": 256 << 20, "vdf": 256 << 20} {
		base := filepath.Join(dir, name+".raw")
		if err := os.WriteFile(base, []byte("what was here before"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(base, size); err != nil {
			t.Fatal(err)
		}
		before[name] = checksum(t, base)
		moovm(t, dir, "create", "-b", name+".raw", name+".cow").wantStatus(t, 0)
	}
	for _, name := range []string{"vdb", "vdc", "vdd", "vde", "vdf"} {
		args = append(args, "--disk", name+".cow")
	}
	args = append(args, "--disk", tools+",format=raw,ro", "--", "bash", "-c", "FILES="+files+"\n"+fileSystemsScript)
	r := moovm(t, dir, args...)
	t.Log(r)
	r.wantStatus(t, 0)
	for _, want := range []string{"btrfs: whole", "btrfs check: clean", "xfs: whole", "xfs_repair -n: clean",
		"raid5: whole", "raid: 1 of 3 failed", "raid: 0 of 3 failed", "raid5: rebuilt", "kernel: content"} {
		if !strings.Contains(r.stdout, want+"\n") {
			t.Errorf("the guest did not say %q", want)
		}
	}
	for _, on := range []string{"btrfs", "xfs", "raid5"} {
		if n := strings.Count(r.stdout, " on "+on+"\n"); n != 4 {
			t.Errorf("%d of 4 writers came to an end on %s", n, on)
		}
	}
	for _, name := range []string{"vdb", "vdc", "vdd", "vde", "vdf"} {
		moovm(t, dir, "check", name+".cow").wantStatus(t, 0)
		if checksum(t, filepath.Join(dir, name+".raw")) != before[name] {
			t.Errorf("the base of %s has changed", name)
		}
	}
}
