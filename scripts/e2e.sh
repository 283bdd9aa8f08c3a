#!/usr/bin/env bash
# Runs the end-to-end tests: on this machine's KVM if it executes real code, else in sandboxes.
#   scripts/e2e.sh [REGEXP of test names]
. "$(dirname "$0")/lib.sh"

CGO_ENABLED=0 ${GO:-go} test -c -o bin/e2e.test ./internal/e2e
export MOOVM_BIN=$PWD/bin/moovm MOOVM_BASE=$CACHE/base-bookworm.tar MOOVM_KERNEL
# As a sparse archive the image reaches the sandbox without its holes.
if [ ! "$MOOVM_BASE" -nt "$BASE" ]; then
	tar -C "$CACHE" --sparse -cf "$MOOVM_BASE.new" "$(basename "$BASE")" && mv "$MOOVM_BASE.new" "$MOOVM_BASE"
fi
MOOVM_KERNEL=$(compgen -G "$KERNEL_DIR/boot/vmlinuz-*") || die "no kernel in $KERNEL_DIR; run make setup"
test=$PWD/bin/e2e.test
cd internal/e2e

if "$MOOVM_BIN" doctor --json | grep -q '"accel": "kvm"'; then
	step "End-to-end tests on this machine's KVM"
	exec "$test" -test.v -test.timeout 30m -test.run "${1:-.}"
fi

# Each test gets a sandbox of its own, and up to two more tries if it fails: QEMU 7.2's emulation of nested virtualisation
# now and then stalls, or resets a guest in its first instructions. What needed more than one is listed at the end.
step "End-to-end tests in sandboxes (this machine's KVM is not enough; see moovm doctor)"
passed=() again=() failed=()
for name in $("$test" -test.list "${1:-.}"); do
	for try in 1 2 3; do
		if timeout --kill-after 20 420 "$MOOVM_BIN" sandbox --memory 8G -- "$test" -test.v -test.timeout 400s -test.run "^$name\$" </dev/null; then
			passed+=("$name")
			[ $try = 1 ] || again+=("$name")
			continue 2
		fi
		note "$name failed, try $try of 3"
	done
	failed+=("$name")
done
[ ${#again[@]} = 0 ] || note "passed only after a failed try: ${again[*]}"
[ ${#failed[@]} = 0 ] || note "failed: ${failed[*]}"
echo "e2e: ${#passed[@]} passed, ${#failed[@]} failed"
[ ${#failed[@]} = 0 ] && [ ${#passed[@]} -gt 0 ]
