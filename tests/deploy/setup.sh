#!/usr/bin/env bash
# Install KServe's models into .venv-kserve, from their lock.
# Needs .venv (its Python and uv); writes nowhere else.
set -euo pipefail
cd "$(dirname "$0")/../.."

environment=.venv-kserve
uv=.venv/bin/uv

rm -rf "$environment"
"$uv" venv --quiet --no-project --python .venv/bin/python "$environment"
"$uv" pip sync --quiet --python "$environment/bin/python" --require-hashes tests/deploy/requirements.txt
touch "$environment/.installed"
