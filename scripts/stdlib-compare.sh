#!/usr/bin/env bash
# Runs tests of Go's standard library, and of golang.org/x/sys/unix, unmodified: here as root, and in a guest by
# `go test -exec 'moovm test'`. Prints, as a table in Markdown, how many passed, failed and were skipped in both, and
# each test whose outcome differs. Exit status 1 if any does.
#   scripts/stdlib-compare.sh [PACKAGE…]
. "$(dirname "$0")/lib.sh"

GO=${GO:-go}
MOOVM=${MOOVM_BIN:-$PWD/bin/moovm}
[ "$(id -u)" = 0 ] || die "compares with this machine's results as root; run it as root"
[ $# -gt 0 ] || set -- os syscall os/exec path/filepath net golang.org/x/sys/unix
flags=(-short -count=1 -v -timeout "${TIMEOUT:-30m}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# outcomes FILE: "test outcome", a line each.
outcomes() { sed -nE 's/^ *--- (PASS|FAIL|SKIP): ([^ ]+) .*/\2 \1/p' "$1" | LC_ALL=C sort -u; }
count() { grep -c " $2\$" "$1" || true; }

differ=0
echo "| package | host: pass, fail, skip | guest: pass, fail, skip | other outcome in the guest |"
echo "|---|---|---|---|"
for package in "$@"; do
	name=${package//\//_}
	$GO test "${flags[@]}" "$package" >"$work/$name.host" 2>&1 </dev/null || true
	$GO test "${flags[@]}" -exec "$MOOVM test ${MOOVM_TEST_FLAGS:---memory 2G}" "$package" >"$work/$name.guest" 2>&1 </dev/null || true
	for side in host guest; do
		outcomes "$work/$name.$side" >"$work/$name.$side.list"
		[ -s "$work/$name.$side.list" ] || { tail -20 "$work/$name.$side" >&2; die "$package: no test ran ($side)"; }
	done
	other=$(LC_ALL=C diff "$work/$name.host.list" "$work/$name.guest.list" | sed -nE 's/^< (.*)/host \1/p; s/^> (.*)/guest \1/p' | sort -k2,2 -k1,1r | paste -sd ';' | sed 's/;/; /g' || true)
	if [ -n "$other" ]; then differ=1; fi
	[ ${#other} -lt 3000 ] || other="${other:0:3000}… (cut)"
	# shellcheck disable=SC2016
	printf '| `%s` | %s, %s, %s | %s, %s, %s | %s |\n' "$package" \
		"$(count "$work/$name.host.list" PASS)" "$(count "$work/$name.host.list" FAIL)" "$(count "$work/$name.host.list" SKIP)" \
		"$(count "$work/$name.guest.list" PASS)" "$(count "$work/$name.guest.list" FAIL)" "$(count "$work/$name.guest.list" SKIP)" \
		"${other:-none}"
	[ -z "${KEEP:-}" ] || cp "$work/$name".{host,guest} "$KEEP/"
done
exit $differ
