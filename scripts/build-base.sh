#!/usr/bin/env bash
# Builds the base image: a real Debian 12 (minbase, systemd, udev) in an ext4 file system, without mounting.
# Log in as root, without a password, on the serial console.
. "$(dirname "$0")/lib.sh"

if [ -s "$BASE" ]; then
	step "Base image: $BASE (cached)"
	exit 0
fi
step "Building the base image: Debian 12 minbase with systemd and udev"
mkdir -p "$CACHE"
tmp=$(mktemp -d "$CACHE/.base.XXXXXX")
trap 'as_root rm -rf "$tmp"' EXIT

sources=()
for f in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list.d/debian.list; do
	if [ -s "$f" ] && grep -q bookworm "$f"; then sources+=("$f"); fi
done
as_root mmdebstrap --quiet --variant=minbase --include=systemd-sysv,udev \
	--customize-hook='echo moovm > "$1/etc/hostname"' \
	--customize-hook='chroot "$1" passwd -q -d root' \
	--customize-hook='printf "/dev/vda / ext4 errors=remount-ro 0 1\n" > "$1/etc/fstab"' \
	bookworm "$tmp/root" "${sources[@]}"
as_root mke2fs -q -t ext4 -L moovm-root -d "$tmp/root" "$tmp/base.img" 2G
as_root chown "$(id -u):$(id -g)" "$tmp/base.img"
mv "$tmp/base.img" "$BASE"
note "$BASE: $(du -h "$BASE" | cut -f1) of $(du -h --apparent-size "$BASE" | cut -f1)"
