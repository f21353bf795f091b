#!/bin/sh
# Runs a command with every file in /run/secrets as a variable of that name: programs that know variables only, and
# secrets that stand in no compose file, no image and no command line.
set -eu
for file in "${SECRETS_FOLDER:-/run/secrets}"/*; do
    [ -f "$file" ] || continue
    if [ ! -r "$file" ]; then
        echo "with-secrets: $file cannot be read by user $(id -u); expected a file that it may read" >&2
        exit 2
    fi
    export "$(basename "$file")=$(cat "$file")"
done
exec "$@"
