#!/bin/bash
# vet-ports: go vet for systems other than Linux on x86-64, of every package that the table in
# docs/PORTABILITY.md says is built there. A package that is not in the table is an error.
set -uo pipefail
cd "$(dirname "$0")/.."

table=docs/PORTABILITY.md
bad=0
module=$(go list -m)
for target in darwin/arm64 freebsd/amd64 linux/arm64; do
	export GOOS=${target%/*} GOARCH=${target#*/} CGO_ENABLED=0
	vet=()
	for p in $(go list ./...); do
		p=${p#"$module/"}
		where=$(awk -F' *[|] *' -v p="\`$p\`" '$2 == p {print $3}' $table)
		case $where in
		everywhere | "builds everywhere") vet+=("./$p") ;;
		Linux) [ "$GOOS" != linux ] || vet+=("./$p") ;;
		*) echo "$table has no line for $p: say in its second column whether it is built everywhere, or on Linux" >&2; bad=1 ;;
		esac
	done
	go vet "${vet[@]}" || { echo "go vet for $target failed; $table says where each package is built" >&2; bad=1; }
done
exit $bad
