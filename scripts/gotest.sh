#!/usr/bin/env bash
# Runs `go test` with these arguments. A machine under load now and then starves a test of one of the many processes it
# starts: packages that failed are run once more, by themselves, and named at the end. A data race is never given another
# try, nor is what does not compile.
. "$(dirname "$0")/lib.sh"

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
${GO:-go} test "$@" 2>&1 | tee "$log" || status=$?
[ "$status" != 0 ] || exit 0
! grep -qE '^WARNING: DATA RACE|\[(build|setup) failed\]$' "$log" || exit "$status"

failed=$(awk '$1 == "FAIL" && $2 ~ /\// {print $2}' "$log" | sort -u)
[ -n "$failed" ] || exit "$status"
# The flags, without the packages.
flags=()
for a; do case $a in ./*) ;; *) flags+=("$a") ;; esac; done
step "Once more, one package at a time: $(tr '\n' ' ' <<<"$failed")"
# shellcheck disable=SC2086
${GO:-go} test -count 1 -p 1 "${flags[@]}" $failed
note "passed only at the second try: $(tr '\n' ' ' <<<"$failed")"
