#!/bin/sh
# In a build: install our wheel into the environment, and lay what came of it apart, under /ours.
set -eu
/opt/build/bin/uv pip install --quiet --no-deps /wheel/*.whl
/opt/build/bin/cyclonedx-py environment --output-reproducible --output-file /opt/venv/sbom.json /opt/venv
site=$(echo /opt/venv/lib/python3*/site-packages)
mkdir /ours
for package in "$@"; do
    /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash "$site/$package"
    cp -a --parents "$site/$package" /ours
done
cp -a --parents "$site"/train_export-*.dist-info /opt/venv/bin/serve-export /opt/venv/sbom.json /ours
case " $* " in *" pipeline "*) cp -a --parents /opt/venv/bin/train-export /ours ;; esac
