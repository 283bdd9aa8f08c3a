#!/usr/bin/env bash
# Puts tools for tests into an ext4 image, from which a guest runs them: chroot MOUNTPOINT fio. They are Debian's packages,
# unpacked with the libraries they need, not installed.
. "$(dirname "$0")/lib.sh"

packages=(fio btrfs-progs xfsprogs mdadm)
IMAGE=$CACHE/tools.img
# The list beside it says what is in it.
if [ -s "$IMAGE" ] && [ "$(cat "$IMAGE.list" 2>/dev/null)" = "${packages[*]}" ]; then
	step "Tools for guests: $IMAGE (cached)"
	exit 0
fi
step "Packing tools for guests: ${packages[*]}"
mkdir -p "$CACHE"
tmp=$(mktemp -d "$CACHE/.tools.XXXXXX")
trap 'as_root rm -rf "$tmp"' EXIT

sources=()
for f in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list.d/debian.list; do
	if [ -s "$f" ] && grep -q bookworm "$f"; then sources+=("$f"); fi
done
include=$(IFS=,; echo "${packages[*]}")
as_root mmdebstrap --quiet --variant=extract --include="$include" bookworm "$tmp/root" "${sources[@]}"
as_root rm -rf "$tmp"/root/usr/share/{doc,man,locale,info} "$tmp"/root/var/{cache,lib}/apt
as_root mkdir -p "$tmp"/root/{dev,proc,sys,tmp,run,mnt}
as_root mke2fs -q -t ext4 -L moovm-tools -d "$tmp/root" "$tmp/tools.img" 768M
as_root chown "$(id -u):$(id -g)" "$tmp/tools.img"
mv "$tmp/tools.img" "$IMAGE"
echo "${packages[*]}" >"$IMAGE.list"
note "$IMAGE: $(du -h "$IMAGE" | cut -f1)"
