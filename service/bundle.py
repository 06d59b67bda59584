"""Read one bundle folder and verify it against its manifest.

A bundle is `NAME/VERSION/` with `manifest.json` in it. Nothing here loads the model: that a file
is what the pipeline wrote is decided before onnxruntime sees a byte of it.
"""

import hashlib
import io
import re
import tokenize
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from protos import bundle_pb2
from service import model_file
from service.errors import BundleError

FORMAT = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
GOLDEN = "golden.npz"
LOGITS = "logits"  # the output that a classifier's parity is measured on
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")  # no zero-padding: one number has one folder
# What zipfile, zlib and numpy raise when they are given other bytes than they wrote.
NOT_GOLDEN = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    OverflowError,
    EOFError,
    MemoryError,
    RuntimeError,  # encrypted; its subclass NotImplementedError: an unknown compression
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,  # of the text before an array
    SyntaxError,
)
ADDRESS = re.compile(r"<[^<>]* at 0x[0-9a-f]+>")  # of a Python object
MAX_SHOWN_CHARACTERS = 200
MAX_PATH_CHARACTERS = 1000
MAX_GOLDEN_BYTES = 1 << 29  # five hundred colour images of 512 x 512 take 400 MB
MAX_MANIFEST_BYTES = 8 << 20  # a thousand classes with their tables stay far below it


class Golden(NamedTuple):
    """Inputs with the original model's answers, small enough to be answered at every load.

    Of a classifier the inputs are images and the outputs logits; in the file they are called so.
    """

    inputs: NDArray[np.generic]  # (rows, ...), as the model takes them
    outputs: NDArray[np.floating]  # (rows, ...)
    hostile_inputs: NDArray[np.generic]
    hostile_outputs: NDArray[np.floating]
    labels: NDArray[np.integer]  # (rows,) of a classifier; empty otherwise


class Bundle(NamedTuple):
    """A bundle whose every file matches its manifest."""

    path: Path
    manifest: bundle_pb2.BundleManifest
    model: bytes  # of model.onnx: the bytes that were hashed are the bytes that are loaded
    golden: Golden


def read(path: Path) -> Bundle:
    """Read a bundle and verify the size and the SHA-256 of every file in it.

    Raises:
        BundleError: the manifest cannot be read, a file is missing or different, or the model
            reaches outside its file. A file that is not listed is never read, and so does no harm.
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
    model_file.check(needed[MODEL], shown(path, MODEL))
    return Bundle(path, manifest, needed[MODEL], _golden(path, needed[GOLDEN], manifest.kind))


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


def checked_output(manifest: bundle_pb2.BundleManifest) -> str:
    """Return the name of the output that parity is measured on."""
    return LOGITS if manifest.kind != bundle_pb2.KIND_GENERIC else manifest.outputs[0].name


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
        raise BundleError(f"{source} is not a bundle manifest: {_reason(error)}") from error
    if manifest.format != FORMAT:
        raise BundleError(f"{source} has format {manifest.format}, expected {FORMAT}")
    if not NAME.fullmatch(manifest.name):
        raise BundleError(f"{source} names the model {_cut(manifest.name)!r}, which is not a name")
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
        raise BundleError(
            f"{shown(path, MANIFEST)} lists {_cut(file.path)!r}, which leaves the bundle"
        )
    if not file.path.isprintable() or len(file.path) > MAX_PATH_CHARACTERS:
        raise BundleError(
            f"{shown(path, MANIFEST)} lists {_cut(file.path)!r}, which is not a file's name"
        )
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
            f"{name} has sha256 {digest[:12]}…, expected {_plain(file.sha256[:12])}…; "
            "it was changed after it was published"
        )
    return content


def _golden(path: Path, content: bytes, kind: bundle_pb2.Kind.ValueType) -> Golden:
    generic = kind == bundle_pb2.KIND_GENERIC
    inputs, outputs = ("inputs", "outputs") if generic else ("images", "logits")
    try:
        _check_unpacked(content)
        # np.load would take a lone array as well.
        with np.lib.npyio.NpzFile(io.BytesIO(content), allow_pickle=False) as arrays:
            return Golden(
                inputs=_array(arrays, inputs),
                outputs=_array(arrays, outputs),
                hostile_inputs=_array(arrays, f"hostile_{inputs}"),
                hostile_outputs=_array(arrays, f"hostile_{outputs}"),
                labels=np.empty(0, np.int64) if generic else _array(arrays, "labels"),
            )
    except NOT_GOLDEN as error:
        raise BundleError(f"{shown(path, GOLDEN)} is not a golden set: {_reason(error)}") from error


def _check_unpacked(content: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        size_bytes = sum(file.file_size for file in archive.infolist())
    if size_bytes > MAX_GOLDEN_BYTES:
        raise ValueError(f"it has {size_bytes} bytes unpacked, expected at most {MAX_GOLDEN_BYTES}")


def _array(arrays: np.lib.npyio.NpzFile, name: str) -> NDArray[Any]:
    value = arrays[name]
    if not isinstance(value, np.ndarray):  # numpy returns the bytes of what is no array
        raise TypeError(f"{name} is not an array")
    return value


def _reason(error: Exception) -> str:
    """Return what a library says of bytes it cannot read, fit to be told to clients."""
    said = str(error)
    if said.startswith("Failed to parse JSON: "):  # what follows is an exception from its inside
        return "it has other fields than a manifest"
    line = ADDRESS.sub("…", said).strip().partition("\n")[0]
    return _plain(line) or "it is damaged"


def _plain(text: str) -> str:
    """Cut a text and escape what is not to be printed, so that it can be sent and logged."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in _cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else f"{text[:MAX_SHOWN_CHARACTERS]}…"
