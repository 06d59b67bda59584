"""Read objects with KServe's own models; runs in .venv-kserve, imports nothing of this project.

Objects come as a list in JSON on standard input, what is wrong with them leaves as one on standard
output. What is not KServe's own, as a container, is passed over: Kubernetes' schemas are for that.
"""

import importlib
import json
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GENERIC = re.compile(r"(list\[|dict\(str, )(.+)[\])]")
PLAIN: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "object": object,
}


def models() -> Any:
    """Import kserve's models without kserve itself, which wants a server's libraries."""
    spec = find_spec("kserve")
    assert spec is not None
    assert spec.origin is not None
    package = types.ModuleType("kserve")
    package.__path__ = [str(Path(spec.origin).parent)]
    sys.modules["kserve"] = package
    return importlib.import_module("kserve.models")


def troubles(kserve: Any, kind: str, value: Any, where: str) -> list[str]:
    """Return what in a value is not of a type of KServe's models."""
    generic = GENERIC.fullmatch(kind)
    if generic:
        items = enumerate(value) if generic[1] == "list[" else value.items()
        return [
            text
            for key, one in items
            for text in troubles(kserve, generic[2], one, f"{where}.{key}")
        ]
    if kind in PLAIN:
        return [] if isinstance(value, PLAIN[kind]) else [f"{where} is {value!r}, expected {kind}"]
    model = getattr(kserve, kind, None)
    return of_model(kserve, model, value, where) if model else []


def of_model(kserve: Any, model: Any, value: dict[str, Any], where: str) -> list[str]:
    """Return unknown fields, values of another type, and what the model itself refuses."""
    names = {json_name: name for name, json_name in model.attribute_map.items()}
    found = [f"{where}.{key} is no field of {model.__name__}" for key in value if key not in names]
    known = {names[key]: one for key, one in value.items() if key in names}
    for name, one in known.items():
        kind = model.openapi_types[name]
        found += troubles(kserve, kind, one, f"{where}.{model.attribute_map[name]}")
    try:
        model(**known)
    except ValueError as error:
        found.append(f"{where}: {error}")
    return found


def main() -> None:
    """Answer what is asked on standard input."""
    kserve = models()
    found: list[str] = []
    for one in json.load(sys.stdin):
        version = one["apiVersion"].rpartition("/")[2]
        found += of_model(
            kserve, getattr(kserve, version.capitalize() + one["kind"]), one, one["kind"]
        )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
