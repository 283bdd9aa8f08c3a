#!/usr/bin/env bash
# Builds a disk that firmware boots: Debian 12 with its own kernel, initramfs and GRUB, for BIOS and UEFI. The tests serve it to QEMU.
# Made without mounting: an MBR with GRUB behind it, an EFI system partition and an ext4 root. Log in as root, without a password.
. "$(dirname "$0")/lib.sh"

DISK=$CACHE/bootdisk-bookworm.img
if [ -s "$DISK" ]; then
	step "Boot disk: $DISK (cached)"
	exit 0
fi
for tool in mmdebstrap mke2fs mkfs.fat mcopy grub-mkimage; do
	command -v "$tool" >/dev/null || die "$tool is missing; run: apt-get install mmdebstrap e2fsprogs dosfstools mtools grub-common"
done
for arch in i386-pc x86_64-efi; do
	[ -d "/usr/lib/grub/$arch" ] || die "GRUB for $arch is missing; run: apt-get install grub-pc-bin grub-efi-amd64-bin"
done
step "Building the boot disk: Debian 12 with its own kernel and GRUB"
mkdir -p "$CACHE"
tmp=$(mktemp -d "$CACHE/.bootdisk.XXXXXX")
trap 'as_root rm -rf "$tmp"' EXIT

sources=()
for f in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list.d/debian.list; do
	if [ -s "$f" ] && grep -q bookworm "$f"; then sources+=("$f"); fi
done
as_root mmdebstrap --quiet --variant=minbase --include=systemd-sysv,udev,initramfs-tools,linux-image-cloud-amd64 \
	--customize-hook='echo bootdisk > "$1/etc/hostname"' \
	--customize-hook='chroot "$1" passwd -q -d root' \
	--customize-hook='printf "LABEL=moovm-boot / ext4 errors=remount-ro 0 1\n" > "$1/etc/fstab"' \
	--customize-hook='echo MODULES=list > "$1/etc/initramfs-tools/conf.d/modules"' \
	--customize-hook='printf "virtio_pci\nvirtio_blk\next4\n" > "$1/etc/initramfs-tools/modules"' \
	--customize-hook='chroot "$1" update-initramfs -u >/dev/null' \
	bookworm "$tmp/root" "${sources[@]}"
as_root mkdir -p "$tmp/root/boot/grub"
as_root tee "$tmp/root/boot/grub/grub.cfg" >/dev/null <<'CFG'
echo "moovm: GRUB ($grub_platform) reads its configuration"
linux /vmlinuz root=LABEL=moovm-boot console=ttyS0 mitigations=off panic=-1 quiet
initrd /initrd.img
boot
CFG
as_root mke2fs -q -q -t ext4 -L moovm-boot -d "$tmp/root" "$tmp/root.img" 1000M

# What GRUB does before it finds its configuration, on the partition of that label.
cat > "$tmp/early.cfg" <<'CFG'
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
search --no-floppy --label moovm-boot --set=root
set prefix=($root)/boot/grub
configfile $prefix/grub.cfg
CFG
modules=(part_msdos ext2 fat serial terminal search search_label configfile normal echo linux boot halt)
grub-mkimage -O i386-pc -p /boot/grub -c "$tmp/early.cfg" -o "$tmp/core.img" biosdisk "${modules[@]}"
grub-mkimage -O x86_64-efi -p /boot/grub -c "$tmp/early.cfg" -o "$tmp/bootx64.efi" "${modules[@]}"
[ "$(stat -c %s "$tmp/core.img")" -lt $((2047 * 512)) ] || die "GRUB's core does not fit before the first partition"
truncate -s 16M "$tmp/esp.img"
mkfs.fat -F 16 -n EFI "$tmp/esp.img" >/dev/null
mmd -i "$tmp/esp.img" ::/EFI ::/EFI/BOOT
mcopy -i "$tmp/esp.img" "$tmp/bootx64.efi" ::/EFI/BOOT/BOOTX64.EFI

# Sector 0: GRUB's boot code and the partition table; 1 and on: its core; 2048: the EFI partition; 34816: the root.
out=$tmp/disk.img
truncate -s 1024M "$out"
dd if=/usr/lib/grub/i386-pc/boot.img of="$out" bs=440 count=1 conv=notrunc status=none
# Two entries of 16 bytes: active, CHS of no use, type, CHS, first sector, number of sectors. And the signature.
printf '%b' '\x00\xfe\xff\xff\xef\xfe\xff\xff\x00\x08\x00\x00\x00\x80\x00\x00' \
	'\x80\xfe\xff\xff\x83\xfe\xff\xff\x00\x88\x00\x00\x00\x40\x1f\x00' | dd of="$out" bs=1 seek=446 conv=notrunc status=none
printf '\x55\xaa' | dd of="$out" bs=1 seek=510 conv=notrunc status=none
dd if="$tmp/core.img" of="$out" bs=512 seek=1 conv=notrunc status=none
dd if="$tmp/esp.img" of="$out" bs=1M seek=1 conv=notrunc,sparse status=none
dd if="$tmp/root.img" of="$out" bs=1M seek=17 conv=notrunc,sparse status=none
mv "$out" "$DISK"
note "$DISK: $(du -h "$DISK" | cut -f1) of $(du -h --apparent-size "$DISK" | cut -f1)"
