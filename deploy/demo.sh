#!/bin/sh
# Tells the story of a token's 24 hours: `make demo` runs it. A day takes seconds here, the back end is simulated, and
# everything is in a scratch folder, without root. Each thing that is said is checked: what does not happen as it is told
# ends the demo with an error.
set -eu
umask 022

here=$(cd "$(dirname "$0")/.." && pwd)
day=${DEMO_DAY:-16} # seconds; a machine that is too busy for such a short day gets a longer one
longest_day=256
vault=https://vault.azure.net
storage=https://storage.azure.com

daemon=
back_end=
building=
log=
scratch=

# end stops what runs and removes what was made, however the demo ends.
end() {
	status=$?
	trap '' INT TERM HUP
	trap - EXIT
	for process in $building $daemon $back_end; do
		kill "$process" 2>/dev/null || :
		wait "$process" 2>/dev/null || :
	done
	if [ "$status" -ne 0 ] && [ "$status" -ne 130 ] && [ -n "$scratch" ]; then
		echo "the demo failed; perceptd said last:" >&2
		tail -n 20 "$scratch/perceptd.log" >&2 2>/dev/null || :
	fi
	rm -rf ${log:+"$log"} ${scratch:+"$scratch"}
	exit "$status"
}
trap end EXIT
trap 'exit 130' INT TERM HUP

bold= plain=
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
	bold=$(printf '\033[1m') plain=$(printf '\033[0m')
fi

# say is the sentence before a step. At a terminal there is a moment to read it.
say() {
	printf '\n%s== %s%s\n' "$bold" "$1" "$plain"
	shift
	for line in "$@"; do
		printf '   %s\n' "$line"
	done
	pause 1
}

pause() {
	if [ -t 1 ]; then
		sleep "$1"
	fi
}

show() {
	printf '%s$ %s%s\n' "$bold" "$*" "$plain"
}

# run shows a command and its output, as far as the sed script $shown leaves it. The whole is kept in $said for checks.
shown=
run() {
	show "$@"
	failed=0
	said=$("$@" 2>&1) || failed=$?
	printf '%s\n' "$said" | sed "$shown"
	shown=
	return "$failed"
}

# look is run for what is worth its colours, which a terminal alone gets.
look() {
	if ! [ -t 1 ]; then
		run "$@"
		return
	fi
	show "$@"
	failed=0
	"$@" || failed=$?
	said=$("$@" 2>&1) || :
	return "$failed"
}

# fail ends the demo: something that was said is not so.
fail() {
	printf 'not so: %s\n' "$*" >&2
	exit 1
}

# wants checks that what was printed last has some text, wherever its lines are broken.
wants() {
	case $(printf '%s' "$said" | tr -s ' \n' '  ') in
	*"$1"*) ;;
	*) fail "\"$1\" is not in what was printed" ;;
	esac
}

# too_late is called where a day was over before its story was told, since the machine had no time for it.
too_late() {
	if [ "$day" -ge "$longest_day" ]; then
		fail "the day was over before its story was told, although it took $day seconds"
	fi
	printf '\nThis machine is too busy for a day of %s seconds: %s.\n' "$day" "$1"
	printf 'Once more, with a day that takes %s seconds.\n' $((day * 4))
	trap - EXIT
	kill $daemon $back_end 2>/dev/null || :
	wait
	cd /
	rm -rf "$scratch"
	DEMO_DAY=$((day * 4)) exec "$here/deploy/demo.sh"
}

# await repeats a command until it succeeds. What it waits for comes in less than a second on an idle machine.
await() {
	what=$1
	shift
	tries=0
	until "$@" >/dev/null 2>&1; do
		tries=$((tries + 1))
		if [ "$tries" -gt 1200 ]; then
			fail "$what did not happen in two minutes"
		fi
		if [ -n "$daemon" ] && ! kill -0 "$daemon" 2>/dev/null; then
			fail "perceptd ended"
		fi
		sleep 0.1
	done
}

# held is the beginning of the SHA-256 of each token that perceptd holds, and given that of what the back end gave last.
held() {
	perceptctl status --json | sed -n 's/.*"token_sha256": "\([0-9a-f]\{12\}\).*/\1/p'
}
given() {
	printf '%s\n' "$said" | sed -n 's/^token *sha256 \([0-9a-f]*\).*/\1/p'
}

# build makes the binaries, and shows that it is at work.
build() {
	echo "Building perceptd and perceptctl. The first time Go fetches and compiles all"
	echo "that they are made of, which takes minutes. Later it takes seconds."
	log=$(mktemp "${TMPDIR:-/tmp}/percept-build.XXXXXX")
	GOFLAGS="${GOFLAGS:-} -v" "${MAKE:-make}" -C "$here" --no-print-directory build >"$log" 2>&1 &
	building=$!
	waited=0
	while kill -0 "$building" 2>/dev/null; do
		sleep 1
		waited=$((waited + 1))
		if [ $((waited % 5)) -eq 0 ]; then
			printf '  %s seconds: %s packages are compiled or fetched\n' "$waited" "$(grep -c / "$log" || :)"
		fi
	done
	built=0
	wait "$building" || built=$?
	building=
	if [ "$built" -ne 0 ]; then
		cat "$log" >&2
	fi
	rm -f "$log"
	return "$built"
}

start_perceptd() {
	show "perceptd --config config.toml --runtime-dir run \\
    --state-dir state --cache-key key &"
	perceptd --config config.toml --runtime-dir run --state-dir state --cache-key key 2>>perceptd.log &
	daemon=$!
	await "perceptd's first answer" perceptctl status --json
}

if [ -z "${DEMO_DAY:-}" ]; then
	build
fi
PATH=$here/bin:$PATH
# /tmp by choice: the paths of sockets have to be short, and others may not change what leads to a configuration.
scratch=$(mktemp -d /tmp/percept-demo.XXXXXX 2>/dev/null) || scratch=$(mktemp -d)
cd "$scratch"
mkdir -m 0700 run state
PERCEPT_SOCKET=$scratch/run/token.sock
export PERCEPT_SOCKET
(umask 077 && head -c 32 /dev/urandom >key)
cat >config.toml <<TOML
[source]
kind = "simulated"

[[identity]]
name = "device"
default = true

[[grant]]
caller = { uid = $(id -u) }
identity = "device"
resources = ["$vault"]
TOML

say "A back end and a configuration" \
	"Azure's managed identities are simulated here: a day takes $day seconds." \
	"The configuration says who may have which tokens: you, for a key vault."
show "perceptctl simulate --form app-service --rollover half-life --spread 5m \\
    --speed $((86400 / day)) --env-file back-end &"
perceptctl simulate --form app-service --rollover half-life --spread 5m --speed $((86400 / day)) \
	--env-file back-end >/dev/null &
back_end=$!
await "the back end's start" test -s back-end
set -a
. ./back-end
set +a
cat config.toml

say "A program asks perceptd for a token" \
	"It is shortened here. Without perceptd, an SDK is given the same one."
start_perceptd
run perceptctl token --resource "$vault" --short || fail "there is no token"
run perceptctl simulate ask --resource "$vault" || fail "the back end gives no token"
old=$(given)
[ -n "$old" ] || fail "the back end's token has no SHA-256"
[ "$(held)" = "$old" ] || too_late "the first token was replaced"
kept=$(printf '%s\n' "$said" | sed -n 's/^kept *by an SDK alone until \(.*\) (in .*/\1/p')
[ -n "$kept" ] || fail "it is not said until when an SDK keeps the token"

say "Permissions change in the directory" \
	"The device gets an app role, Vault.Read: new tokens of it carry that."
run perceptctl simulate permissions --identity device --roles Vault.Read || fail "no change"
wants "changed; tokens minted from"

say "Azure keeps handing out the token from before" \
	"It caches a token for a day, and nothing can make it give a newer one. An SDK" \
	"alone gets the same one again, without the role, and keeps it until" \
	"$kept."
run perceptctl simulate ask --resource "$vault" || fail "the back end gives no token"
[ "$(given)" = "$old" ] || too_late "the back end has a newer token already"
wants "1 app role (Simulated.Read)"

say "perceptd is told of the change, and labels the token" \
	"SDKs get it with the header Percept-Permissions: stale, and come back sooner."
shown='/^A current/,$d'
run perceptctl policy-changed "$vault" --effect granted --note more || fail "the change is not noted"
shown='s/\("access_token": ".\{12\}\)[^"]*/\1.../; /token_type\|client_id\|refresh_in\|received_on\|sha256/d'
run perceptctl token --resource "$vault" --json || fail "there is no token"
[ "$(held)" = "$old" ] || too_late "perceptd has a newer token already"
wants "stale"

say "perceptd looks for the moment at which Azure hands out a newer one" \
	"It asks seldom at first, and not while the change still spreads." \
	"Half a day goes by ..."
await "the rollover" sh -c 'perceptctl status --json | grep -q "\"standing\": \"current\""'
new=$(held)
[ "$new" != "$old" ] || fail "the token that is current is the old one"
run perceptctl simulate ask --resource "$vault" || fail "the back end gives no token"
[ "$(given)" = "$new" ] || too_late "the second token was replaced"
wants "1 app role (Vault.Read)"
printf '\nperceptd has the new token. An SDK alone holds the old one until %s.\n' "$kept"
pause 1

say "The day in a picture" "S is the stretch in which the token was stale."
look perceptctl timeline || fail "there is no picture"
wants "S stale"
[ "$(held)" = "$new" ] || too_late "the second token was replaced"

say "What was not granted is denied, and the answer has the mend" \
	"The program asks for another resource. The administrator runs the command" \
	"that stands in the answer, here without sudo and for this configuration."
denied=0
look perceptctl token --resource "$storage" --short || denied=$?
[ "$denied" -eq 4 ] || fail "the answer was status $denied, not 4: denied"
mend=$(printf '%s\n' "$said" | sed -n 's/.*sudo \(perceptctl grants add .*\)/\1/p' | head -n 1)
[ -n "$mend" ] || fail "the answer has no command that mends it"
printf '\n'
# shellcheck disable=SC2086 # its words
run $mend --yes --config config.toml || fail "the grant was not added"
run perceptctl token --resource "$storage" --short || fail "it is denied still"

say "The back end goes down, and perceptd is restarted" \
	"Tokens are kept, sealed by a key: programs get them all the same."
show "kill $back_end $daemon"
kill "$back_end"
wait "$back_end" || :
back_end=
before=$(held)
kill "$daemon"
wait "$daemon" || fail "perceptd did not stop in order"
daemon=
start_perceptd
run perceptctl token --resource "$vault" --short || too_late "the kept token has expired"
run perceptctl token --resource "$storage" --short || too_late "the kept token has expired"
[ "$(held)" = "$before" ] || too_late "a kept token has expired"
if perceptctl refresh >/dev/null 2>&1; then
	fail "the back end is not down"
fi

say "The back end comes back" "perceptd notices by itself; this is what a technician sees."
show "perceptctl simulate --resume &"
perceptctl simulate --resume --rollover half-life --spread 5m >/dev/null &
back_end=$!
await "the recovery" sh -c 'perceptctl status >status.txt && ! grep -q "failing\|missing\|trouble" status.txt'
look perceptctl status || fail "the status is not healthy"
wants "ready"

kill "$daemon"
wait "$daemon" || fail "perceptd did not stop in order"
daemon=

cat <<'TEXT'

That was a day. Nothing of it is left on this machine. Next:
  sudo make install   on a device with systemd; it prints what follows
  make demo-fleet     200 devices, and how a change reaches them by IoT Hub
  README.md           what programs and administrators do
TEXT
