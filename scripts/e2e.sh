#!/usr/bin/env bash
# Runs the end-to-end tests: on this machine's KVM if it executes real code, else in the sandbox.
#   scripts/e2e.sh [test flags, such as -test.run Login]
. "$(dirname "$0")/lib.sh"

CGO_ENABLED=0 ${GO:-go} test -c -o bin/e2e.test ./internal/e2e
export MOOVM_BIN=$PWD/bin/moovm MOOVM_BASE=$CACHE/base-bookworm.tar MOOVM_KERNEL
# As a sparse archive the image reaches the sandbox without its holes.
if [ ! "$MOOVM_BASE" -nt "$BASE" ]; then
	tar -C "$CACHE" --sparse -cf "$MOOVM_BASE.new" "$(basename "$BASE")" && mv "$MOOVM_BASE.new" "$MOOVM_BASE"
fi
MOOVM_KERNEL=$(compgen -G "$KERNEL_DIR/boot/vmlinuz-*") || die "no kernel in $KERNEL_DIR; run make setup"
flags=(-test.v -test.timeout 40m "$@")

cd internal/e2e
if "$MOOVM_BIN" doctor --json | grep -q '"accel": "kvm"'; then
	step "End-to-end tests on this machine's KVM"
	exec ../../bin/e2e.test "${flags[@]}"
fi
step "End-to-end tests in the sandbox (this machine's KVM is not enough; see moovm doctor)"
exec "$MOOVM_BIN" sandbox --memory 10G -- ../../bin/e2e.test "${flags[@]}"
