"""Read one bundle folder and verify it against its manifest.

A bundle is `NAME/VERSION/` with `manifest.json` in it. Nothing here loads the model: that a file
is what the pipeline wrote is decided before onnxruntime sees a byte of it.
"""

import hashlib
import io
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from protos import bundle_pb2
from service.errors import BundleError

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
GOLDEN = "golden.npz"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")  # no zero-padding: one number has one folder
# What zipfile, zlib and numpy raise when they are given other bytes than they wrote.
NOT_GOLDEN = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    EOFError,
    MemoryError,
    RuntimeError,  # encrypted; its subclass NotImplementedError: an unknown compression
    zipfile.BadZipFile,
    zlib.error,
)
MAX_MANIFEST_BYTES = 8 << 20  # a thousand classes with their tables stay far below it


@dataclass(frozen=True, slots=True)
class Golden:
    """Images with the original model's answers, small enough to be answered at every load."""

    images: NDArray[np.uint8]  # (rows, height, width, channels)
    labels: NDArray[np.int64]  # (rows,)
    logits: NDArray[np.float32]  # (rows, classes)
    hostile_images: NDArray[np.uint8]
    hostile_logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose every file matches its manifest."""

    path: Path
    manifest: bundle_pb2.BundleManifest
    model: bytes  # of model.onnx: the bytes that were hashed are the bytes that are loaded
    golden: Golden


def read(path: Path) -> Bundle:
    """Read a bundle and verify the size and the SHA-256 of every file in it.

    Raises:
        BundleError: the manifest cannot be read, or a file is missing or different.
            A file that is not listed is never read, and so does no harm.
    """
    manifest = read_manifest(path)
    listed = {file.path for file in manifest.files}
    for required in (MODEL, GOLDEN):
        if required not in listed:
            raise BundleError(f"{shown(path, MANIFEST)} does not list {required}; publish it again")
    needed = {}
    for file in manifest.files:
        content = _verified(path, file)
        if file.path in (MODEL, GOLDEN):
            needed[file.path] = content
    return Bundle(path, manifest, needed[MODEL], _golden(path, needed[GOLDEN]))


def shown(path: Path, file: str = "") -> str:
    """Name a bundle, or a file in it, without saying where on this host the repository is.

    What is refused is reported to clients, and the host's paths are none of their business.
    """
    return PurePosixPath(path.parent.name, path.name, file).as_posix()


def read_manifest(path: Path) -> bundle_pb2.BundleManifest:
    """Read `manifest.json` of a bundle without looking at the other files.

    Raises:
        BundleError: there is none, or it is not a manifest of a known format for this folder.
    """
    source = shown(path, MANIFEST)
    if (path / MANIFEST).is_symlink() or not (path / MANIFEST).is_file():
        raise BundleError(f"{source} is missing, or not a plain file; publish it again")
    try:
        with (path / MANIFEST).open("rb") as file:
            content = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise BundleError(f"{source} cannot be read: {error.strerror}") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{source} is over {MAX_MANIFEST_BYTES} bytes; it is not a manifest")
    manifest = parse_manifest(content, source)
    named = (manifest.name, str(manifest.version))
    if named != (path.parent.name, path.name):
        raise BundleError(
            f"{source} is of {manifest.name} version {manifest.version}, "
            f"expected {path.parent.name} version {path.name}; a bundle may not be renamed"
        )
    return manifest


def parse_manifest(content: bytes, source: str) -> bundle_pb2.BundleManifest:
    """Parse a manifest; `source` is named in the errors.

    Raises:
        BundleError: it is not JSON of a manifest, or of another format.
    """
    manifest = bundle_pb2.BundleManifest()
    try:
        # What this version does not know may be ignored: `format` grows when it may not.
        json_format.Parse(content, manifest, ignore_unknown_fields=True)
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BundleError(f"{source} is not a bundle manifest: {reason}") from error
    if manifest.format != FORMAT:
        raise BundleError(f"{source} has format {manifest.format}, expected {FORMAT}")
    if not NAME.fullmatch(manifest.name):
        raise BundleError(f"{source} names the model {manifest.name!r}, which is not a name")
    return manifest


def sha256(content: bytes) -> str:
    """Return the digest as lower-case hexadecimal, as manifests hold it."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the digest of a file's content, as `sha256` does."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(path: Path, file: bundle_pb2.File) -> bytes:
    relative = PurePosixPath(file.path)
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        raise BundleError(f"{shown(path, MANIFEST)} lists {file.path!r}, which leaves the bundle")
    target, name = path / relative, shown(path, file.path)
    try:
        # A link in the middle of the path leaves the bundle as well as one at its end.
        if not target.is_file() or target.resolve() != path.resolve() / relative:
            raise BundleError(f"{name} is missing, or not a plain file; publish it again")
        if target.stat().st_size != file.size_bytes:
            raise BundleError(
                f"{name} has {target.stat().st_size} bytes, expected {file.size_bytes}; "
                "it was cut or changed after it was published"
            )
        content = target.read_bytes()
    except OSError as error:
        raise BundleError(f"{name} cannot be read: {error.strerror}") from error
    digest = sha256(content)
    if digest != file.sha256:
        raise BundleError(
            f"{name} has sha256 {digest[:12]}…, expected {file.sha256[:12]}…; "
            "it was changed after it was published"
        )
    return content


def _golden(path: Path, content: bytes) -> Golden:
    try:
        # np.load would take a lone array as well.
        with np.lib.npyio.NpzFile(io.BytesIO(content), allow_pickle=False) as arrays:
            return Golden(
                images=arrays["images"],
                labels=arrays["labels"],
                logits=arrays["logits"],
                hostile_images=arrays["hostile_images"],
                hostile_logits=arrays["hostile_logits"],
            )
    except NOT_GOLDEN as error:
        raise BundleError(f"{shown(path, GOLDEN)} is not a golden set: {error}") from error
