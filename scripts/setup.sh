#!/usr/bin/env bash
# Installs the Debian packages that the demo and the tests use, fetches the stock kernel and builds the base
# image. Everything is cached: a second run only looks.
. "$(dirname "$0")/lib.sh"

# qemu: the sandbox, and readers of what we write; mmdebstrap, e2fsprogs: the base image;
# uml-utilities, user-mode-linux: the other programs that speak COW; ovmf, grub, mtools, dosfstools: a disk that PC firmware boots;
# the rest: used by tests.
packages=(qemu-system-x86 qemu-utils mmdebstrap e2fsprogs kmod uml-utilities user-mode-linux acpica-tools
	busybox-static fio jq ovmf grub-pc-bin grub-efi-amd64-bin grub-common mtools dosfstools)
missing=()
for p in "${packages[@]}"; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
if [ ${#missing[@]} -gt 0 ]; then
	step "Installing ${missing[*]}"
	as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
	step "Packages: all here"
fi

scripts/fetch-kernel.sh
scripts/build-base.sh
scripts/build-tools.sh
scripts/build-bootdisk.sh
