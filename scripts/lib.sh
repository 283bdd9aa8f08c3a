# Shared by the scripts beside it: where things are cached, and how to say what is going on.
# shellcheck shell=bash
set -euo pipefail
export LC_ALL=C.UTF-8
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CACHE=${MOOVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/moovm}
KERNEL_DIR=$CACHE/kernel/current # boot/vmlinuz-*, lib/modules/*
BASE=$CACHE/base-bookworm.img

if [ -t 1 ]; then bold=$'\e[1m' dim=$'\e[2m' off=$'\e[0m'; else bold='' dim='' off=''; fi
step() { printf '%s==>%s %s\n' "$bold" "$off" "$*"; }
note() { printf '    %s%s%s\n' "$dim" "$*" "$off"; }
die()  { printf 'error: %s\n' "$*" >&2; exit 1; }

# as_root CMD…: run CMD as root, by sudo if need be.
as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"
	elif command -v sudo >/dev/null; then sudo "$@"
	else die "this step needs root (to run: $*); run it as root or install sudo"; fi
}
