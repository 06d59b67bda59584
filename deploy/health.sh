#!/bin/sh
# Docker starts again what ends, and leaves what hangs: here six failures in a row end the server.
serve-export health && exec rm -f /tmp/failures
printf . >>/tmp/failures
[ "$(wc -c </tmp/failures)" -lt 6 ] || kill -KILL -1
exit 1
