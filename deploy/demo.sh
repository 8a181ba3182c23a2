#!/bin/sh
# Shows perceptd at work: on a simulated back end, in a scratch folder, without root. `make demo` runs it.
set -eu

bin=$(cd "$(dirname "$0")/../bin" && pwd)
scratch=$(mktemp -d)
daemon=
stop() {
	status=$?
	trap - EXIT INT TERM
	if [ -n "$daemon" ]; then
		kill "$daemon" 2>/dev/null || :
		wait "$daemon" 2>/dev/null || :
	fi
	if [ "$status" -ne 0 ]; then
		echo "the demo failed; the daemon said:" >&2
		cat "$scratch/perceptd.log" >&2 2>/dev/null || :
	fi
	rm -rf "$scratch"
	exit "$status"
}
trap stop EXIT
trap 'exit 130' INT TERM

say() { printf '\n== %s\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

mkdir -m 0700 "$scratch/run"
umask 022
cat >"$scratch/config.toml" <<TOML
[source]
kind = "simulated"

[[identity]]
name = "device"
default = true

[[identity]]
name = "vision"
client_id = "00000000-0000-0000-0000-000000000001"

[[grant]]
caller = { uid = $(id -u) }
identity = "device"
resources = ["https://vault.azure.net"]

[[module]]
name = "vision"
require = "socket"

[[grant]]
caller = { module = "vision" }
identity = "vision"
resources = ["https://storage.azure.com"]
prefetch = true
TOML
PERCEPT_SOCKET=$scratch/run/token.sock
export PERCEPT_SOCKET
PATH=$bin:$PATH

say "A configuration: two identities, and who may have which tokens"
cat "$scratch/config.toml"

say "The daemon, on its embedded simulated back end"
echo "\$ perceptd --config config.toml --runtime-dir run --state-dir state"
perceptd --config "$scratch/config.toml" --runtime-dir "$scratch/run" --state-dir "$scratch/state" 2>"$scratch/perceptd.log" &
daemon=$!
tries=0
until perceptctl status >/dev/null 2>&1; do
	tries=$((tries + 1))
	if [ "$tries" -gt 100 ] || ! kill -0 "$daemon" 2>/dev/null; then
		exit 1
	fi
	sleep 0.1
done
head -n 3 "$scratch/perceptd.log"

say "A local process asks for a token (shortened here)"
run perceptctl token --resource https://vault.azure.net --short

if command -v curl >/dev/null; then
	say "The same as Azure's SDKs ask, on the socket that only the module vision has"
	echo "\$ curl --unix-socket run/modules/vision/token.sock -H Metadata:true \\"
	echo "    'http://localhost/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://storage.azure.com'"
	curl -fsS --unix-socket "$scratch/run/modules/vision/token.sock" -H Metadata:true \
		'http://localhost/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://storage.azure.com' |
		sed -E 's/("access_token":"[^"]{12})[^"]*/\1.../'
	echo
else
	say "curl is not installed: the request as Azure's SDKs make it is left out"
fi

say "What was not granted is denied"
perceptctl token --resource https://storage.azure.com --short && exit 1
[ $? -eq 4 ] || exit 1

say "A second request comes from the cache: one fetch, two served"
run perceptctl token --resource https://vault.azure.net --short
if perceptctl status --json | grep -q '"fetches": [2-9]'; then
	echo "the second request was not served from the cache" >&2
	exit 1
fi

say "The status, as a technician sees it"
run perceptctl status

say "Done: stopping the daemon"
kill "$daemon"
wait "$daemon"
daemon=
