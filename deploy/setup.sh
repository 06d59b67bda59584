#!/bin/sh
# Make the secrets that containers share and nobody has to know, once; variables win.
set -eu
umask 022
keep() { # NAME VALUE
    [ -n "$2" ] || [ ! -s "/keys/$1" ] || return 0
    value=${2:-$(python -c 'import secrets; print(secrets.token_urlsafe(32))')}
    printf '%s\n' "$value" >"/keys/.$1"
    mv "/keys/.$1" "/keys/$1"
}
keep postgres-password "${POSTGRES_PASSWORD:-}"
keep admin-token "${SERVE_EXPORT_ADMIN_TOKEN:-}"
