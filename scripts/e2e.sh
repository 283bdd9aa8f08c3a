#!/usr/bin/env bash
# Runs the end-to-end tests: on this machine's KVM if it executes real code, else in sandboxes.
#   scripts/e2e.sh [REGEXP of test names]     MOOVM_TEST_LONG=1 also runs those that take minutes
. "$(dirname "$0")/lib.sh"

CGO_ENABLED=0 ${GO:-go} test -c -o bin/e2e.test ./internal/e2e
for example in gokvm backend net; do CGO_ENABLED=0 ${GO:-go} build -o bin/example-$example ./examples/$example; done
export MOOVM_TOOLS=$CACHE/tools.img
export MOOVM_BIN=$PWD/bin/moovm MOOVM_BASE=$CACHE/base-bookworm.tar MOOVM_KERNEL
# As a sparse archive the image reaches the sandbox without its holes.
if [ ! "$MOOVM_BASE" -nt "$BASE" ]; then
	tar -C "$CACHE" --sparse -cf "$MOOVM_BASE.new" "$(basename "$BASE")" && mv "$MOOVM_BASE.new" "$MOOVM_BASE"
fi
MOOVM_KERNEL=$(compgen -G "$KERNEL_DIR/boot/vmlinuz-*") || die "no kernel in $KERNEL_DIR; run make setup"
test=$PWD/bin/e2e.test
logs=$PWD/bin/e2e
cd internal/e2e

if "$MOOVM_BIN" doctor --json | grep -q '"accel": "kvm"'; then
	step "End-to-end tests on this machine's KVM"
	exec "$test" -test.v -test.timeout 30m -test.run "${1:-.}"
fi

# Each test gets a sandbox of its own, two sandboxes at a time with one processor each, and up to two more tries if it
# fails: QEMU 7.2's emulation of nested virtualisation now and then stalls, or resets a guest. What needed more than one
# try is listed at the end.
step "End-to-end tests in sandboxes (this machine's KVM is not enough; see moovm doctor)"
rm -rf "$logs" && mkdir -p "$logs"
limit=420
if [ -n "${MOOVM_TEST_LONG-}" ]; then
	limit=2400
	# Compiling the runtime in a guest would take longer than all the rest of a build there.
	export MOOVM_E2E_GOCACHE=$CACHE/go-build
	(cd / && GOCACHE=$MOOVM_E2E_GOCACHE CGO_ENABLED=0 ${GO:-go} build runtime)
fi

# one NAME: its tries, with a word of each; its output is in $logs/NAME.TRY.
one() {
	local name=$1 try start status
	for try in 1 2 3; do
		start=$SECONDS
		status=0
		timeout --foreground --kill-after 20 "$limit" "$MOOVM_BIN" sandbox --memory 8G -- \
			"$test" -test.v -test.timeout "$((limit - 20))s" -test.run "^$name\$" </dev/null >"$logs/$name.$try" 2>&1 || status=$?
		cat "$logs/$name.$try"
		case $status in
		0)
			note "$name: $((SECONDS - start)) s"
			return
			;;
		130 | 143) exit 255 ;; # interrupted: xargs ends
		esac
		note "$name failed, try $try of 3, after $((SECONDS - start)) s"
	done
	touch "$logs/$name.failed"
}
export -f one note
export test logs limit dim off
# The long ones would only skip, a sandbox each; so would TestGuest…, which TestHarness runs in its guests.
"$test" -test.list "${1:-.}" | grep '^Test' | grep -v '^TestGuest' | { [ -n "${MOOVM_TEST_LONG-}" ] && cat || grep -v '^TestLong'; } >"$logs/list"
xargs -P "${MOOVM_E2E_JOBS:-2}" -I{} bash -c 'one {}' <"$logs/list"

names=$(wc -l <"$logs/list")
failed=$(find "$logs" -name '*.failed' -printf '%f\n' | sed 's/\.failed$//' | sort)
again=$(comm -23 <(find "$logs" -name '*.2' -printf '%f\n' | sed 's/\.2$//' | sort) <(echo "$failed"))
[ -z "$again" ] || note "passed only after a failed try: $(tr '\n' ' ' <<<"$again")"
[ -z "$failed" ] || note "failed: $(tr '\n' ' ' <<<"$failed")"
bad=$(grep -c . <<<"$failed" || true)
echo "e2e: $((names - bad)) passed, $bad failed"
[ "$bad" = 0 ] && [ "$names" -gt 0 ]
