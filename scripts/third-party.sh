#!/usr/bin/env bash
# Runs the tests of other people's modules, unmodified: here as root, and in a guest by `moovm test`. Prints, as a table in
# Markdown, how many passed, failed and were skipped in both. Exit status 1 if a guest's figures are not those below, which
# are of Debian's 6.1 kernel with one processor, in the sandbox; docs/TESTING.md explains them.
#   scripts/third-party.sh [REGEXP of package names]     KEEP=DIR keeps what they wrote
. "$(dirname "$0")/lib.sh"

# module, version, package, pass,fail,skip in the guest, flags of the tests
suites='
github.com/moby/sys/mountinfo v0.7.2 . 38,0,0 -
github.com/google/nftables v0.3.0 . 124,1,0 -run_system_tests
github.com/vishvananda/netlink v1.3.1 . 56,0,7 -test.run=Tuntap|LinkAddDel|Addr
github.com/containerd/cgroups/v3 v3.1.3 ./cgroup2 48,9,1 -
github.com/cilium/ebpf v0.22.0 ./internal/tracefs 48,0,0 -
github.com/cilium/ebpf v0.22.0 ./features 111,3,1 -
'

GO=${GO:-go}
MOOVM=${MOOVM_BIN:-$PWD/bin/moovm}
[ "$(id -u)" = 0 ] || die "compares with this machine's results as root; run it as root"
work=$(mktemp -d)
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT

# figures FILE: pass,fail,skip of each test and subtest that ended.
figures() {
	local word
	for word in PASS FAIL SKIP; do grep -cE "^ *--- $word: " "$1" || true; done | paste -sd,
}

wrong=0 rows=0
echo "| package | host: pass, fail, skip | guest: pass, fail, skip |"
echo "|---|---|---|"
while read -r module version package want flags; do
	[ -n "$module" ] || continue
	name=$module${package#.}
	grep -qE "${1:-.}" <<<"$name" || continue
	rows=$((rows + 1))
	# The module cache is read-only, and no main module.
	src=$work/${module//\//_}
	if [ ! -d "$src" ]; then
		cp -r "$(cd / && $GO mod download -json "$module@$version" | sed -nE 's/.*"Dir": "(.*)".*/\1/p')" "$src"
		chmod -R u+w "$src"
	fi
	# Some look at their own name: it is what `go test` gives it.
	test=$src/$package/$(basename "${name%/v[0-9]*}").test
	(cd "$src" && GOFLAGS=-mod=mod $GO test -c -o "$test" "$package")
	args=(-test.v -test.short -test.timeout 15m)
	[ "$flags" = - ] || args+=("$flags")
	for side in host guest; do
		run=("$test")
		[ $side = host ] || run=("$MOOVM" test --memory 2G --cpus 1 "$test")
		(cd "$src/$package" && "${run[@]}" "${args[@]}") >"$work/$side" 2>&1 </dev/null || true
		[ -z "${KEEP:-}" ] || cp "$work/$side" "$KEEP/$(tr / _ <<<"$name").$side"
	done
	got=$(figures "$work/guest")
	printf '| `%s` %s | %s | %s |\n' "$name" "$version" "$(figures "$work/host" | sed 's/,/, /g')" "${got//,/, }"
	if [ "$got" != "$want" ]; then
		echo "error: $name: $got in the guest, expected $want" >&2
		wrong=1
	fi
done <<<"$suites"
[ "$rows" -gt 0 ] || die "no package fits ${1:-}"
exit $wrong
