"""Change an input in its own terms: messages by field, JSON by value, zip and PNG by part.

Bytes that were changed blindly seldom pass the first parser. Nothing here needs atheris.
"""

import contextlib
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

Bytes = Callable[[bytes], bytes]
SMALL = [0, 1, 2, 3, 7, 8, 9, -1, -2, 127, 255, 256]
INTEGERS = [*SMALL, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 1]
NUMBERS = [0.0, -0.0, 1.0, -1.5, 1e-45, 1e38, 1e308, float("inf"), float("-inf"), float("nan")]
NAMES = ["tiny", "other", "../tiny", "/etc/passwd", "image", "logits", "UINT8", "BYTES"]
STRINGS = ["", "0", "1", "-1", "01", "a\0b", "ä", "x" * 300, *NAMES]
FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
PNG = b"\x89PNG\r\n\x1a\n"
LARGE = 1 << 16  # bytes
MANY = 300
STOP = 64  # most fields of one message that are looked at


def some_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, double or insert a few bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(len(changed) + 1)
        size = rng.choice([1, 1, 2, 4, 16])
        part = changed[place : place + size]
        changed[place : place + rng.choice([0, size])] = rng.choice(
            [part, part * 2, b"", rng.randbytes(size), bytes(size), b"\xff" * size]
        )
    return bytes(changed)


def message(content: bytes, kind: type[Message], rng: random.Random, change: Bytes) -> Message:
    """Parse a message and change some of its fields; what is not one becomes an empty one first."""
    parsed = kind()
    with contextlib.suppress(DecodeError):
        parsed.ParseFromString(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if parsed.ByteSize() < LARGE:
            _change_field(rng.choice(_messages(parsed)), rng, change)
    return parsed


def _messages(top: Message) -> list[Message]:
    found = [top]
    for one in found:
        for field, value in one.ListFields()[:STOP]:
            if field.message_type is None:
                continue
            if field.message_type.GetOptions().map_entry:
                mapped = field.message_type.fields_by_name["value"]
                found += [value[key] for key in value] if mapped.message_type is not None else []
            else:
                found += value[:STOP] if field.is_repeated else [value]
    return found


def _change_field(owner: Message, rng: random.Random, change: Bytes) -> None:
    fields = owner.DESCRIPTOR.fields
    filled: list[Any] = [field for field, _ in owner.ListFields()]
    if not fields:
        return
    field: FieldDescriptor = rng.choice(filled if filled and rng.random() < 0.7 else fields)
    with contextlib.suppress(ValueError, TypeError):  # a value that the field does not take
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _change_map(getattr(owner, field.name), field, rng)
        elif field.is_repeated:
            _change_list(getattr(owner, field.name), field, rng, change)
        elif rng.random() < 0.2:
            owner.ClearField(field.name)
        elif field.message_type is not None:
            getattr(owner, field.name).SetInParent()
        else:
            setattr(owner, field.name, _value(field, getattr(owner, field.name), rng, change))


def _change_map(entries: Any, field: FieldDescriptor, rng: random.Random) -> None:
    key = rng.choice(["classification", "priority", "timeout", "sequence_id", *STRINGS])
    mapped = field.message_type.fields_by_name["value"]
    if rng.random() < 0.2:
        entries.clear()
    elif mapped.message_type is not None:
        _change_field(entries[key], rng, bytes)
    else:
        entries[key] = rng.choice(STRINGS)


def _change_list(values: Any, field: FieldDescriptor, rng: random.Random, change: Bytes) -> None:
    place = rng.randrange(len(values)) if values else None
    action = rng.choice(["add", "double", "drop", "change", "change"])
    if place is None or action == "add":
        if field.message_type is not None:
            values.add()
        else:
            values.append(_value(field, b"" if _is_bytes(field) else 0, rng, change))
    elif action == "double":
        values.extend([values[place]] * rng.choice([1, 1, 2, MANY if len(values) < MANY else 1]))
    elif action == "drop":
        del values[place]
    elif field.message_type is None:
        values[place] = _value(field, values[place], rng, change)


def _is_bytes(field: FieldDescriptor) -> bool:
    return field.type == FieldDescriptor.TYPE_BYTES


def _value(field: FieldDescriptor, old: Any, rng: random.Random, change: Bytes) -> Any:
    if _is_bytes(field):
        return change(old)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return rng.choice(STRINGS)
    if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type in FLOATS:
        return rng.choice(NUMBERS)
    return rng.choice([*INTEGERS, old + 1, old - 1])


def json_text(content: bytes, rng: random.Random) -> bytes:
    """Change some values of a JSON document."""
    try:
        top = {"": json.loads(content)}
    except (ValueError, RecursionError):
        return some_bytes(content, rng)
    for _ in range(rng.choice([1, 1, 2, 4])):
        places: list[tuple[Any, Any]] = [(top, "")]
        for owner, key in places:
            value = owner[key]
            if isinstance(value, dict | list):
                keys = value if isinstance(value, dict) else range(len(value))
                places += [(value, inner) for inner in list(keys)[:STOP]]
        owner, key = rng.choice(places)
        owner[key] = _json_value(owner[key], rng)
    return json.dumps(top[""]).encode(errors="surrogatepass")


def _json_value(old: Any, rng: random.Random) -> Any:
    if isinstance(old, dict) and old and rng.random() < 0.8:
        key = rng.choice(list(old))
        return {name: value for name, value in old.items() if name != key}
    if isinstance(old, list) and old and rng.random() < 0.8:
        return old + [rng.choice(old)] * rng.choice([1, 1, MANY if len(old) < MANY else 1])
    if isinstance(old, str) and rng.random() < 0.5:
        return some_bytes(old.encode(errors="surrogatepass"), rng).decode(errors="replace")
    return rng.choice([None, True, [], {}, old, str(old), "\ud800", *STRINGS, *INTEGERS, *NUMBERS])


def zip_file(content: bytes, rng: random.Random, change: Bytes) -> bytes:
    """Change one file of a zip, with the checksums made right again, and how it is compressed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            files = {info.filename: archive.read(info) for info in archive.infolist()}
    except Exception:  # noqa: BLE001  it was changed into something else: go on with its bytes
        return some_bytes(content, rng)
    if files:
        name = rng.choice(list(files))
        if rng.random() < 0.1:
            files[rng.choice([*files, "other.npy"])] = files.pop(name)
        else:
            files[name] = change(files[name])
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, file in files.items():
            archive.writestr(name, file, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    return made.getvalue()


def png(content: bytes, rng: random.Random, change: Bytes) -> bytes:
    """Change one chunk of a PNG, with its checksum made right again; other bytes blindly."""
    chunks = _chunks(content)
    if not chunks or rng.random() < 0.2:
        return change(content)
    place = rng.randrange(len(chunks))
    kind, data = chunks[place]
    action = rng.choice(["data", "data", "pixels", "double", "drop", "kind"])
    if action == "pixels" and kind == b"IDAT":
        with contextlib.suppress(zlib.error):
            chunks[place] = (
                kind,
                zlib.compress(change(zlib.decompressobj().decompress(data, 1 << 16))),
            )
    elif action == "double":
        chunks.insert(place, (kind, data))
    elif action == "drop":
        del chunks[place]
    elif action == "kind":
        chunks[place] = rng.choice([b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"tRNS", b"acTL"]), data
    else:
        chunks[place] = kind, change(data)
    return PNG + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found = []
    place = len(PNG)
    while content.startswith(PNG) and place + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, place)
        found.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += size + 12
    return found


def framed(parts: Sequence[bytes]) -> bytes:
    """Join byte strings as BYTES are on the wire: each after its length in four bytes."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def unframed(content: bytes) -> list[bytes]:
    """Split what `framed` joined; nothing if it is not that."""
    parts = []
    while len(content) >= 4:
        (size,) = struct.unpack_from("<I", content)
        parts.append(content[4 : 4 + size])
        content = content[4 + size :]
    return parts if framed(parts).endswith(b"".join(parts[-1:])) and not content else []
