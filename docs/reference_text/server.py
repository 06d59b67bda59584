"""What a server is told and tells: its settings, its metrics, the statuses of refusals."""

import inspect
import os
from collections.abc import Iterator
from dataclasses import MISSING, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from docs.reference_text.table import UnsaidError, code, sentence, setting, table
from service.call import STATUS
from service.metrics import Metrics
from service.settings import CHOICES, ENVIRONMENT_PREFIX, LIMITS, Settings
from service.statistics import FAILURES

KINDS: dict[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "switch",
    Path | str: "path or URL",
}


def settings() -> Iterator[str]:
    """Give every option of a server, with its variable."""
    for group, members in groupby(fields(Settings), lambda one: one.metadata["group"]):
        yield from (f"## {group}", "")
        for one in members:
            default = "required" if one.default is MISSING else _default(one.default)
            words = f"Variable {code(ENVIRONMENT_PREFIX + one.name.upper())}."
            about = (_values(one.name, one.type), default)
            option = f"--{one.name.replace('_', '-')}"
            yield from setting(option, *about, f"{one.metadata['help']}\n\n{words}")


def metrics() -> Iterator[str]:
    """Give every metric, as a server without models tells them."""
    told = Metrics(list, lambda: [os.getpid()], version="", onnxruntime="").collect()
    rows = []
    for one in told:
        if not one.documentation:
            raise UnsaidError(f"the metric {one.name} has no help")
        kind = "counter" if one.type == "unknown" else one.type  # as Metrics.text says it
        name = f"{one.name}_total" if one.type == "counter" else one.name
        labels = ", ".join(map(code, getattr(one, "_labelnames", ())))
        rows.append((code(name), kind, labels, sentence(one.documentation)))
    yield from table(("metric", "type", "labels", "meaning"), sorted(rows))
    yield f"`reason` is one of {', '.join(map(code, FAILURES))}."


def statuses() -> Iterator[str]:
    """Give every refusal that reaches a client, under the status of gRPC that it becomes."""
    rows = [
        (code(status.name), str(status.value), (inspect.getdoc(error) or "").split("\n")[0])
        for error, status in sorted(STATUS.items(), key=lambda one: one[1].name)
    ]
    yield from table(("status", "number", "when"), rows)


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "off"
    return "unset" if value in (None, "") else code(value)


def _values(name: str, kind: object) -> str:
    if name in CHOICES:
        return ", ".join(map(code, CHOICES[name]))
    words = KINDS.get(kind, "path")
    if name in LIMITS:
        smallest, largest = LIMITS[name]
        return f"{words}, {smallest:,} to {largest:,}"
    return words
