#!/usr/bin/env bash
# Fetches stock Debian kernel packages and unpacks them, without installing them, into the cache.
#   scripts/fetch-kernel.sh [current | SERIES[-cloud] ...]     SERIES: 5.10 (bullseye), 6.1 (bookworm), 6.12 (backports)
# Each lands in $CACHE/kernel/RELEASE; a link of the name asked for leads there.
. "$(dirname "$0")/lib.sh"

declare -A suites=([5.10]=bullseye [6.1]=bookworm [6.12]=bookworm-backports)
unset tmp
trap 'rm -rf "${tmp-}"' EXIT

# fetch NAME PACKAGE [APT-OPTION...]: the kernel that the metapackage PACKAGE stands for, linked to as NAME.
fetch() {
	local name=$1 meta=$2 package release
	shift 2
	package=$(apt-cache "$@" depends "$meta" | awk '/Depends: linux-image-[0-9]/ {print $2; exit}')
	[ -n "$package" ] || die "apt knows no $meta; check this machine's apt sources and run apt-get update"
	step "Fetching the stock Debian kernel: $package"
	mkdir -p "$CACHE/kernel"
	tmp=$(mktemp -d "$CACHE/kernel/.new.XXXXXX")
	(cd "$tmp" && apt-get "$@" download -qq "$package" 2> >(grep -v unsandboxed >&2))
	mkdir "$tmp/root"
	dpkg -x "$tmp"/*.deb "$tmp/root"
	release=$(basename "$tmp"/root/boot/vmlinuz-* | sed 's/^vmlinuz-//')
	chmod 755 "$tmp/root"
	# A package has no modules.dep; without one each start would look into every module.
	/sbin/depmod -b "$tmp/root" "$release"
	rm -rf "${CACHE:?}/kernel/$release"
	mv "$tmp/root" "$CACHE/kernel/$release"
	ln -sfn "$release" "$CACHE/kernel/$name"
	rm -rf "$tmp"
	note "unpacked into $CACHE/kernel/$release"
}

# The other suites get an apt state of their own: this machine's sources stay as they are.
apt_of() {
	local suite=$1 state=$CACHE/apt/$1 mirror
	options=(-o Dir::State::lists="$state/lists" -o Dir::Cache="$state/cache" -o Dir::Etc::sourcelist="$state/sources.list"
		-o Dir::Etc::sourceparts=/dev/null -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
		-o APT::Sandbox::User=root -o Acquire::Check-Valid-Until=false)
	mirror=$(apt-get indextargets --format '$(REPO_URI) $(COMPONENT) $(CREATED_BY) $(CODENAME)' | awk '$2 == "main" && $3 == "Packages" && $4 !~ /-/ {print $1; exit}')
	[ -n "$mirror" ] || die "apt has no source of Debian's main component to fetch $suite from; check its sources and run apt-get update"
	mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
	echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$state/sources.list"
	apt-get "${options[@]}" update -qq
}

for name in "${@:-current}"; do
	if compgen -G "$CACHE/kernel/$name/boot/vmlinuz-*" >/dev/null; then
		step "Kernel $name: $(basename "$(readlink -f "$CACHE/kernel/$name")") (cached)"
		continue
	fi
	flavour=amd64 series=${name%-cloud}
	[ "$series" = "$name" ] || flavour=cloud-amd64
	if [ "$name" = current ]; then
		[ -n "$(apt-cache show linux-image-amd64 2>/dev/null)" ] || as_root apt-get update -qq
		fetch current linux-image-amd64
	elif [ -n "${suites[$series]-}" ]; then
		apt_of "${suites[$series]}"
		fetch "$name" "linux-image-$flavour" "${options[@]}"
	else
		die "no kernel series $series; choose from ${!suites[*]}, each also with -cloud"
	fi
done
