#!/bin/sh
# Start one of Prefect's servers with the database's password, which only files know.
set -eu
PREFECT_SERVER_DATABASE_PASSWORD=$(cat /keys/password)
export PREFECT_SERVER_DATABASE_PASSWORD
exec prefect "$@"
