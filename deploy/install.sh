#!/bin/sh
# In a build: install our wheel into the environment, and lay what came of it apart, under /ours.
set -eu
/opt/build/bin/uv pip install --quiet --no-deps /wheel/*.whl
/opt/build/bin/cyclonedx-py environment --output-reproducible --output-file /opt/venv/sbom.json /opt/venv
site=$(echo /opt/venv/lib/python3*/site-packages)
mkdir -p /ours/opt/venv/bin
cd "$site"
set -- "$@" train_export-*.dist-info
for package in "$@"; do
    /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash "$package"
done
mkdir -p "/ours$site"
cp -a "$@" "/ours$site"
cd /opt/venv
cp -a sbom.json /ours/opt/venv
cp -a bin/serve-export /ours/opt/venv/bin
[ ! -e "/ours$site/pipeline" ] || cp -a bin/train-export /ours/opt/venv/bin
