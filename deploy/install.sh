#!/bin/sh
# Puts what `make build` has made on this device, or under $DESTDIR for a package, and takes it away again. `make install`
# and `make uninstall` run it. It needs neither Go nor git: root may have none, and may not trust another user's repository.
set -eu
umask 022
cd "$(dirname "$0")/.."
dest=${DESTDIR:-}

# files lists all that is installed: mode, file here, file there. What is in systemd/ needs no line of its own.
files() {
	echo 0755 bin/perceptd /usr/bin/perceptd
	echo 0755 bin/perceptctl /usr/bin/perceptctl
	for unit in systemd/*.service systemd/*.socket systemd/*.path systemd/*.timer; do
		[ ! -e "$unit" ] || echo 0644 "$unit" "/usr/lib/systemd/system/${unit#systemd/}"
	done
	echo 0644 systemd/perceptd.sysusers.conf /usr/lib/sysusers.d/perceptd.conf
	echo 0644 systemd/perceptd.tmpfiles.conf /usr/lib/tmpfiles.d/perceptd.conf
	for dropin in systemd/perceptd.service.d/*.conf; do
		echo 0644 "$dropin" "/usr/share/perceptd/${dropin##*/}"
	done
	echo 0644 deploy/config.example.toml /usr/share/perceptd/config.example.toml
	echo 0644 deploy/podman.socket.conf /usr/share/perceptd/podman.socket.conf
	echo 0644 deploy/vision.container /usr/share/perceptd/vision.container
	echo 0644 docs/man/perceptd.8 /usr/share/man/man8/perceptd.8
	echo 0644 docs/man/perceptctl.1 /usr/share/man/man1/perceptctl.1
}

# on_device says whether this is for the running system.
on_device() { [ -z "$dest" ] && [ -d /run/systemd/system ]; }

needs_root() {
	if [ -z "$dest" ] && [ "$(id -u)" != 0 ]; then
		echo "make $1 is root's business: sudo make $1; DESTDIR=folder names another place" >&2
		exit 1
	fi
}

run() {
	echo "+ $*"
	"$@"
}

# why_build says what is wrong with bin/; nothing: it is there, and as new as what it is made of.
why_build() {
	for program in bin/perceptd bin/perceptctl; do
		if [ ! -x "$program" ]; then
			echo "$program is not there"
			return
		fi
		newer=$(find go.mod go.sum agent cmd systemd tokencache -newer "$program" \
			\( -name go.mod -o -name go.sum -o -name '*.go' ! -name '*_test.go' \) | head -n 1)
		if [ -n "$newer" ]; then
			echo "$program is older than $newer"
			return
		fi
	done
	here=$(git -c safe.directory="$PWD" rev-parse HEAD 2>/dev/null || :) # where git is, and can be asked
	if [ -n "$here" ] && [ -e bin/commit ] && [ "$here" != "$(cat bin/commit)" ]; then
		echo "bin/ is of another commit than the repository"
	fi
}

build() {
	why=$(why_build)
	[ -n "$why" ] || return 0
	if ! command -v go >/dev/null; then
		echo "$why, and $(id -un) has no Go: run make build as the user who has it, then this again" >&2
		exit 1
	fi
	echo "$why"
	"${MAKE:-make}" build
}

# What follows on the device, in this order: the manager reads the units; the user is there before folders and the key
# are given to it; the key is there before the daemon starts.
prepare="systemctl daemon-reload
systemd-sysusers perceptd.conf
systemd-tmpfiles --create perceptd.conf
perceptctl cache-key make"
example=/usr/share/perceptd/config.example.toml
config=/etc/percept/config.toml
configure="test -e $config || install -D -m 0644 $example $config"
restart="systemctl restart perceptd-cache-key perceptd"

install_all() {
	needs_root install
	build
	files | while read -r mode from to; do
		install -D -m "$mode" "$from" "$dest$to"
	done
	echo "installed: $("bin/perceptd" --version 2>/dev/null || echo perceptd)"
	if on_device && systemctl is-active --quiet perceptd.service perceptd.socket; then
		upgrade
	else
		say_next
	fi
}

# upgrade has the version that was installed take the place of the one that runs. Clients wait on their sockets meanwhile.
upgrade() {
	echo "$prepare" | while read -r command; do
		# shellcheck disable=SC2086 # words are meant to be split
		run $command </dev/null || echo "that failed; the upgrade goes on without it" >&2
	done
	# shellcheck disable=SC2086
	run $restart
}

say_next() {
	echo "next, as root:"
	echo "$prepare" | sed 's/^/  /'
	echo "  $configure"
	echo "  systemctl enable --now perceptd"
	echo "then write into $config who gets which tokens, and: perceptctl reload"
	echo "(where Azure Arc is installed, copy azure-arc.conf from /usr/share/perceptd to /etc/systemd/system/perceptd.service.d/"
	echo "before the last; docs/iothub.md tells who copies iot-edge.conf or iothub-credential.conf there)"
	echo "over a version that runs, in the place of the last two:"
	echo "  $restart"
}

uninstall_all() {
	needs_root uninstall
	if on_device; then
		stop
	fi
	files | while read -r _ _ to; do
		rm -f "$dest$to"
	done
	if [ -d "$dest/usr/share/perceptd" ]; then
		rmdir --ignore-fail-on-non-empty "$dest/usr/share/perceptd"
	fi
	if on_device; then
		systemctl daemon-reload
		systemctl reset-failed 'perceptd*' 2>/dev/null || : # there may be none
		rm -rf /run/percept /run/percept-cache-key          # the opened key, and sockets where no daemon answers
	fi
	if [ "${PURGE:-}" = 1 ]; then
		rm -rf "$dest/var/lib/percept" "$dest/var/lib/percept-config" "$dest/etc/percept"
		rm -rf "$dest"/etc/systemd/system/perceptd*.d
	fi
	say_left
}

# stop ends all units that are there, at once, so that no client of a socket starts the daemon again.
stop() {
	units=$(files | sed -n 's|.* /usr/lib/systemd/system/||p')
	# shellcheck disable=SC2086 # one word a unit
	systemctl --quiet disable $(echo "$units" | grep -v @) 2>/dev/null || : # those that nothing enables say so
	# shellcheck disable=SC2046 # of a template all that run
	loaded=$(systemctl list-units --all --plain --no-legend $(echo "$units" | sed 's/@\./@*./') | awk '{print $1}')
	if [ -n "$loaded" ]; then
		# shellcheck disable=SC2086
		run systemctl stop $loaded
	fi
}

say_left() {
	left=
	for path in /etc/percept /var/lib/percept /var/lib/percept-config "/etc/systemd/system/perceptd*.d"; do
		# shellcheck disable=SC2086 # a pattern
		for there in $dest$path; do
			[ ! -e "$there" ] || left="$left $there"
		done
	done
	if [ -n "$left" ]; then
		echo "stays:$left"
		echo "make uninstall PURGE=1 removes that too: configuration, keys, tokens, policy changes, deny rules"
	fi
	if on_device && id percept >/dev/null 2>&1; then
		echo "the user percept and the group percept-admin stay, since files elsewhere may be theirs; to remove them:"
		echo "  userdel percept && groupdel percept-admin"
	fi
}

case ${1:-} in
install) install_all ;;
uninstall) uninstall_all ;;
files) files ;;
*)
	echo "usage: DESTDIR=folder $0 install, uninstall (PURGE=1), or files, which lists them" >&2
	exit 2
	;;
esac
