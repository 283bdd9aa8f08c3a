#!/usr/bin/env bash
# Fetches the stock Debian kernel package and unpacks it, without installing it, into the cache.
. "$(dirname "$0")/lib.sh"

if compgen -G "$KERNEL_DIR/boot/vmlinuz-*" >/dev/null; then
	step "Kernel: $(basename "$(readlink -f "$KERNEL_DIR")") (cached)"
	exit 0
fi
[ -n "$(apt-cache show linux-image-amd64 2>/dev/null)" ] || as_root apt-get update -qq
package=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image-[0-9]/ {print $2; exit}')
[ -n "$package" ] || die "apt knows no linux-image-amd64; check this machine's apt sources and run apt-get update"
step "Fetching the stock Debian kernel: $package"

mkdir -p "$CACHE/kernel"
tmp=$(mktemp -d "$CACHE/kernel/.new.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
(cd "$tmp" && apt-get download -qq "$package" 2> >(grep -v unsandboxed >&2))
mkdir "$tmp/root"
dpkg -x "$tmp"/*.deb "$tmp/root"
release=$(basename "$tmp"/root/boot/vmlinuz-* | sed 's/^vmlinuz-//')
chmod 755 "$tmp/root"
# A package has no modules.dep; without one each start would look into every module.
/sbin/depmod -b "$tmp/root" "$release"
rm -rf "$CACHE/kernel/$release"
mv "$tmp/root" "$CACHE/kernel/$release"
ln -sfn "$release" "$KERNEL_DIR"
note "unpacked into $CACHE/kernel/$release"
