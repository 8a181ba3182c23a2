#!/bin/sh
# A module that gets a token for $RESOURCE with curl, in App Service's form. Nothing in it knows of perceptd.
set -eu

resource=${RESOURCE:-https://vault.azure.net}
answer=$(curl -sS --retry 3 --max-time 30 -H "X-IDENTITY-HEADER: $IDENTITY_HEADER" \
	--get "$IDENTITY_ENDPOINT" -d api-version=2019-08-01 --data-urlencode "resource=$resource")
field() { printf '%s' "$answer" | sed -n "s/.*\"$1\": *\"\([^\"]*\)\".*/\1/p"; }

token=$(field access_token)
if [ -z "$token" ]; then
	echo "no token for $resource: $answer" >&2
	exit 1
fi
echo "a token for $resource, to be used for $((($(field expires_in) + 30) / 60)) minutes"
