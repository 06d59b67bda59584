"""Put other bytes into a bundle and sign them, so that they are not refused for their digest."""

import json
from collections.abc import Callable
from pathlib import Path

from google.protobuf import json_format

from protos import bundle_pb2
from service import bundle


def writer(path: Path, name: str) -> Callable[[bytes], None]:
    """Return a function that writes one file of a bundle, and a short manifest that lists it."""
    whole = bundle.read_manifest(path)
    manifest = bundle_pb2.BundleManifest(
        format=whole.format, name=whole.name, version=whole.version, kind=whole.kind
    )
    manifest.files.extend(file for file in whole.files if file.path != name)
    fields = json.loads(json_format.MessageToJson(manifest))

    def write(content: bytes) -> None:
        file = {"path": name, "sizeBytes": len(content), "sha256": bundle.sha256(content)}
        text = json.dumps({**fields, "files": [*fields["files"], file]})
        (path / name).write_bytes(content)
        (path / bundle.MANIFEST).write_text(text)

    return write
