#!/usr/bin/env bash
# The main job: boot a stock Debian on a copy-on-write root disk, read the disk's metadata over 9P inside it,
# and check from outside that everything is as it should be. Its files stay in bin/demo to be looked at.
. "$(dirname "$0")/lib.sh"

moovm=$PWD/bin/moovm
kernel=$(compgen -G "$KERNEL_DIR/boot/vmlinuz-*") || die "no kernel in $KERNEL_DIR; run make setup"
rm -rf bin/demo && mkdir -p bin/demo && cd bin/demo
ln "$BASE" base.img 2>/dev/null || cp --sparse=always "$BASE" base.img
begin=$SECONDS

step "What this machine can do (moovm doctor)"
"$moovm" doctor | sed 's/^/    /' || die "guests cannot run here"

sha() { sha256sum base.img | cut -d' ' -f1; }
before=$(sha)

step "moovm create -b base.img root.cow"
"$moovm" create -b base.img root.cow
note "$(du -h --apparent-size root.cow | cut -f1) for a disk of $(du -h --apparent-size base.img | cut -f1)"

step "First boot: look at /run/moovm, write a file"
date=$(date -u +%FT%TZ)
"$moovm" run --kernel "$kernel" --disk root.cow -- sh -euc '
	. /etc/os-release; echo "$PRETTY_NAME, Linux $(uname -r), root on $(findmnt -no SOURCE,FSTYPE /)"
	findmnt -n /run/moovm
	cd /run/moovm/disks/vda
	echo "--- info";  cat info
	echo "--- map, its first lines"; head -n 5 map
	echo "$1 and the guest wrote this" > /root/written-by-the-guest
	head -c 3000000 /dev/urandom > /root/data; sha256sum /root/data > /root/data.sha256; sync
	echo "--- stats after writing"; cat stats
	echo "--- allocated now: $(cat allocated) sectors"
' sh "$date" | tee first-boot.log | sed 's/^/    /'

step "Second boot: Debian with systemd to its login prompt, on the same disk; log in, look, power off"
"$OLDPWD"/scripts/login.sh "$moovm" "$kernel" root.cow "$date" > second-boot.log || { tail -n 40 second-boot.log; die "the second boot failed"; }
grep -a -E 'Welcome to|login:|written-by-the-guest|and the guest wrote this|data: OK|Powering Off|Power down' second-boot.log | tr -d '\r' | sed 's/^/    /'

step "On the host"
"$moovm" info root.cow | sed 's/^/    /'
"$moovm" map root.cow | awk 'NR == 1 || /root.cow/' | head -n 6 | sed 's/^/    /'
"$moovm" info --json root.cow > info.json
"$moovm" map --json root.cow > map.json
"$moovm" flatten root.cow flat.img
fsck_status=0
e2fsck -f -n flat.img > fsck.log 2>&1 || fsck_status=$?
wrote=$(debugfs -R 'cat /root/written-by-the-guest' flat.img 2>/dev/null)
after=$(sha)

step "Summary"
failed=0
check() { # check WHAT STATUS
	if [ "$2" = 0 ]; then printf '    ok    %s\n' "$1"; else printf '    FAIL  %s\n' "$1"; failed=1; fi
}
is() { "$@" >/dev/null 2>&1 && echo 0 || echo 1; }
check "the guest was Debian on ext4 on our virtio disk"        "$(is grep -q 'Debian.*root on /dev/vda *ext4' first-boot.log)"
check "the metadata tree was mounted over 9P in the guest"      "$(is grep -q '^/run/moovm *moovm *9p' first-boot.log)"
check "its info named the backing file"                         "$(is grep -q 'backing-filename' first-boot.log)"
check "systemd reached the login prompt on the same disk"       "$(is grep -aq 'login:' second-boot.log)"
check "the file of the first boot was there in the second"      "$(is grep -aq "$date and the guest wrote this" second-boot.log)"
check "and the data was what had been written"                  "$(is grep -aq 'data: OK' second-boot.log)"
check "the base image's SHA-256 is what it was"                 "$(is test "$before" = "$after")"
check "moovm info counts the sectors that the guest wrote"      "$(is test "$(sed -n 's/.*"allocated-sectors": \([0-9]*\).*/\1/p' info.json)" -ge 5860)"
check "moovm map shows extents of the overlay"                  "$(is grep -q '"depth":0.*"data":true' map.json)"
check "e2fsck finds the flattened disk clean"                   "$fsck_status"
check "and the guest's file is in it"                           "$(is test "$wrote" = "$date and the guest wrote this")"
note "took $((SECONDS - begin)) s; everything is in bin/demo"
exit $failed
