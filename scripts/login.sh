#!/usr/bin/env bash
# Types on a guest's serial console: logs in, looks at what the first boot left, powers off.
#   login.sh MOOVM KERNEL IMAGE
set -euo pipefail
moovm=$1 kernel=$2 image=$3

log=$(mktemp)
trap 'rm -f "$log"; kill "${GUEST_PID:-}" 2>/dev/null || true' EXIT
coproc GUEST { exec "$moovm" run --kernel "$kernel" --disk "$image" 2>&1; }
exec {from}<&"${GUEST[0]}" {to}>&"${GUEST[1]}"

# wait_for TEXT: read the console until TEXT appears.
wait_for() {
	local seen='' chunk
	while IFS= read -r -t 300 -N 1 chunk <&"$from"; do
		printf '%s' "$chunk"
		seen+=$chunk
		case $seen in *"$1") return 0 ;; esac
		if ((${#seen} > 400)); then seen=${seen: -200}; fi
	done
	echo "login.sh: no \"$1\"" >&2
	return 1
}

wait_for 'login: '
printf 'root\n' >&"$to"
wait_for 'root@moovm'
printf 'cat /root/written-by-the-guest; cd / && sha256sum -c /root/data.sha256; findmnt -n /run/moovm; cat /run/moovm/version\n' >&"$to"
wait_for 'data: OK'
printf 'systemctl poweroff\n' >&"$to"
cat <&"$from" &
reader=$!
wait "$GUEST_PID"
status=$?
wait "$reader"
exit $status
