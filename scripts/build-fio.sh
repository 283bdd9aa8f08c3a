#!/usr/bin/env bash
# Puts this machine's fio and the libraries it takes into an ext4 image, from which a guest runs it: chroot MOUNTPOINT fio.
. "$(dirname "$0")/lib.sh"

IMAGE=$CACHE/fio.img
fio=$(command -v fio) || die "fio is missing; run: apt-get install fio"
if [ -s "$IMAGE" ] && [ "$IMAGE" -nt "$fio" ]; then
	step "fio for guests: $IMAGE (cached)"
	exit 0
fi
step "Packing fio for guests"
tmp=$(mktemp -d "$CACHE/.fio.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
mkdir -p "$tmp"/root/{dev,proc,sys,tmp,usr/bin}
cp -L "$fio" "$tmp/root/usr/bin/fio"
# Each line of ldd has one absolute path: a library, or the loader.
ldd "$fio" | grep -o '/[^ ]*' | sort -u | while read -r lib; do
	cp -L --parents "$lib" "$tmp/root"
done
mke2fs -q -q -t ext4 -L moovm-fio -d "$tmp/root" "$tmp/fio.img" 160M
mv "$tmp/fio.img" "$IMAGE"
note "$IMAGE: $(du -h "$IMAGE" | cut -f1)"
