"""Every setting of a run, from the dataclasses that hold them and the comments beside them."""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from docs.reference_text.table import code, sentence, setting
from pipeline import config

KINDS = {"integer": "whole number", "number": "number", "string": "text", "object": "table"}
BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
Schema: TypeAlias = Mapping[str, Any]


def all_sections() -> Iterator[str]:
    """Give every setting, a table a section."""
    schema = config.SCHEMA.json_schema()
    yield from _section("", config.Config, schema, schema["$defs"])


def presets() -> Iterator[str]:
    """Give what each preset is for, and what it changes of the defaults."""
    for name, make in config.PRESETS.items():
        usual = config.as_tables(config.Config(preset=name))
        yield from (f"### `{name}`", "", sentence(inspect.getdoc(make) or ""), "")
        yield from ("```toml", f'preset = "{name}"')
        yield from _changed("", config.as_tables(make()), usual)
        yield from ("```", "")


def _section(name: str, kind: type, schema: Schema, known: Schema) -> Iterator[str]:
    """Give a section's own settings, then the sections in it."""
    if name:
        yield from (f"### {name}", "", inspect.getdoc(kind) or "", "")
    said = _comments(kind)
    inner = {field: one for field, one in schema["properties"].items() if "$ref" in one}
    own = {field: one for field, one in schema["properties"].items() if field not in inner}
    for field, one in own.items():
        path = f"{name}.{field}" if name else field
        words = sentence(said[field].replace("None:", "unset:")) if field in said else ""
        yield from setting(path, _values(one), _default(one, schema, field), words)
    for field, one in inner.items():
        title = one["$ref"].rpartition("/")[2]
        path = f"{name}.{field}" if name else field
        yield from _section(path, getattr(config, title), known[title], known)


def _comments(kind: type) -> dict[str, str]:
    """Return what the comments above the fields of a dataclass, or beside them, say."""
    source = inspect.getsource(kind)
    notes, alone = dict[int, str](), set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            notes[token.start[0]] = token.string.lstrip("# ")
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    body = ast.parse(source).body[0]
    fields = [one for one in getattr(body, "body", ()) if isinstance(one, ast.AnnAssign)]
    said: dict[str, str] = {}
    for one in fields:
        first = one.lineno
        while first - 1 in alone:
            first -= 1
        lines = range(first, (one.end_lineno or one.lineno) + 1)
        if words := " ".join(notes[line] for line in lines if line in notes):
            said[ast.unparse(one.target)] = words
    return said


def _values(about: Schema) -> str:
    """Say which values JSON schema allows."""
    kinds = [one for one in about.get("anyOf", [about]) if one.get("type") != "null"]
    return " or ".join(map(_kind, kinds))


def _kind(about: Schema) -> str:
    if about["type"] == "boolean":
        return "`true`, `false`"
    if about["type"] == "array":
        items = about.get("prefixItems") or [about["items"]]
        return f"[{', '.join(map(_kind, items))}{'' if 'prefixItems' in about else ', …'}]"
    if "enum" in about:
        return ", ".join(code(f'"{one}"') for one in about["enum"])
    if "pattern" in about:
        return code(about["pattern"].removeprefix("^").removesuffix("$"))
    words = [f"{word} {about[key]:,}" for key, word in BOUNDS.items() if key in about]
    kind = "path" if about.get("format") == "path" else KINDS[about["type"]]
    return ", ".join([kind, *words[:1]]) + "".join(f" and {word}" for word in words[1:])


def _default(about: Schema, schema: Schema, field: str) -> str:
    if field in schema.get("required", ()):
        return ""
    value = about.get("default", {})
    return "unset" if value is None else code(_toml(value))


def _changed(name: str, tables: Schema, usual: Schema) -> Iterator[str]:
    """Give the settings that are not the defaults, as TOML."""
    changed = {key: one for key, one in tables.items() if one != usual[key] and key != "preset"}
    inner = {key: one for key, one in changed.items() if isinstance(one, dict) and usual[key]}
    own = [f"{key} = {_toml(one)}" for key, one in changed.items() if key not in inner]
    if own and name:
        yield from ("", f"[{name}]")
    yield from own
    for key, one in inner.items():
        yield from _changed(f"{name}.{key}" if name else key, one, usual[key])


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
