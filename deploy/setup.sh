#!/bin/sh
# Make the secrets that containers share and nobody has to know, once; variables win.
set -eu
umask 077
keep() { # FILE VALUE
    [ -n "$2" ] || [ ! -s "$1" ] || return 0
    value=${2:-$(python -c 'import secrets; print(secrets.token_urlsafe(32))')}
    printf '%s\n' "$value" >"$1.new"
    chmod "$3" "$1.new"
    mv "$1.new" "$1"
}
database=/keys/database/password
if [ -n "${POSTGRES_PASSWORD:-}" ] && [ -s $database ] && [ "$POSTGRES_PASSWORD" != "$(cat $database)" ]; then
    echo "error: POSTGRES_PASSWORD is not the password that the database was made with; leave it" \
        "empty, or change the database's own first (docs/deployment.md says how)" >&2
    exit 1
fi
keep $database "${POSTGRES_PASSWORD:-}" 444 # Postgres has a user of its own
keep /keys/admin/token "${SERVE_EXPORT_ADMIN_TOKEN:-}" 400
