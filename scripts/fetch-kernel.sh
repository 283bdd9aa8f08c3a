#!/usr/bin/env bash
# Fetches stock Debian kernels into the cache (moovm help kernel).
#   scripts/fetch-kernel.sh [current | SERIES[-cloud] ...]
. "$(dirname "$0")/lib.sh"

step "Stock Debian kernels: ${*:-current}"
[ -n "$(apt-cache show linux-image-amd64 2>/dev/null)" ] || as_root apt-get update -qq
MOOVM_CACHE=$CACHE ${GO:-go} run ./cmd/moovm kernel "${@:-current}"
