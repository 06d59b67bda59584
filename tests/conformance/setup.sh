#!/usr/bin/env bash
# Install the clients of the conformance tests into .venv-conformance, from their locks.
# Needs .venv (its Python and uv) and apt's sources; writes nowhere else, and needs no root.
set -euo pipefail
cd "$(dirname "$0")/../.."

here=tests/conformance
environment=.venv-conformance
uv=.venv/bin/uv

rm -rf "$environment"
"$uv" venv --quiet --no-project --python .venv/bin/python "$environment"
"$uv" pip sync --quiet --python "$environment/bin/python" --require-hashes "$here/requirements.txt"

# The wheel is unpacked for its program alone: another tritonclient serves the tests.
"$uv" pip sync --quiet --python "$environment/bin/python" --target "$environment/perf_analyzer" \
    --require-hashes "$here/perf_analyzer.txt"

# perf_analyzer's remaining library is in no wheel. apt works in a folder of its own, so that its
# lists may be missing and the user anyone.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
private_apt() {
    apt-get --quiet=2 -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache" \
        -o APT::Sandbox::User="$(id -un)" "$@"
}
private_apt update || true # a source that fails may be another than Debian's
(cd "$work" && private_apt download libb64-0d) || {
    echo "error: apt-get cannot fetch libb64-0d, which perf_analyzer needs;" \
        "see that apt's sources name Debian or Ubuntu and can be reached" >&2
    exit 1
}
dpkg -x "$work"/libb64-0d_*.deb "$work/libb64"
mkdir "$environment/lib-perf_analyzer"
cp --dereference "$work"/libb64/usr/lib/*/libb64.so.0d "$environment/lib-perf_analyzer"
cp "$environment"/perf_analyzer/nvidia/cuda_runtime/lib/libcudart.so.12 "$environment/lib-perf_analyzer"

touch "$environment/.installed"
