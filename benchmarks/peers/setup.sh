#!/usr/bin/env bash
# Install one peer into .venv-peers/NAME, from its lock; nothing if that is done already.
# Needs .venv (its Python and uv); writes nowhere else.
#
#     benchmarks/peers/setup.sh mosec
set -euo pipefail
cd "$(dirname "$0")/../.."

name=${1:?"which peer? benchmarks/peers/setup.sh NAME"}
lock=benchmarks/peers/$name.txt
environment=.venv-peers/$name
uv=.venv/bin/uv

if [[ ! -e $lock ]]; then
    echo "error: there is no $lock; see which peers have one: ls benchmarks/peers/*.txt" >&2
    exit 1
fi
if [[ $environment/.installed -nt $lock ]]; then
    exit
fi

rm -rf "$environment"
"$uv" venv --quiet --no-project --python .venv/bin/python "$environment"
"$uv" pip sync --quiet --python "$environment/bin/python" --require-hashes "$lock"
touch "$environment/.installed"
