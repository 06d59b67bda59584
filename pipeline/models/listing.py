"""What each architecture is and costs, built at its natural shape."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.table import Table

from pipeline import models


@dataclass(frozen=True, slots=True)
class Network:
    """One architecture as it is without settings."""

    name: str
    shape: tuple[int, ...]  # of one row
    outputs: int
    dtype: str  # of the input
    parameters: int
    multiply_adds: int  # of one row through it
    about: str  # one sentence
    settings: tuple[str, ...]  # that it takes


def networks() -> tuple[Network, ...]:
    """Build every architecture at its natural shape; takes a second or two."""
    return tuple(_network(name) for name in models.ARCHITECTURES)


def table(listed: Iterable[Network]) -> Table:
    """Return one row a network."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("network", "input"):
        drawn.add_column(column, no_wrap=True)
    for column in ("out", "parameters", "multiply-adds"):
        drawn.add_column(column, justify="right", no_wrap=True)
    drawn.add_column("what it is")
    for one in listed:
        drawn.add_row(
            one.name,
            "x".join(map(str, one.shape)),
            str(one.outputs),
            f"{one.parameters:,}",
            f"{one.multiply_adds:,}",
            f"{one.about} Takes {', '.join(one.settings)}." if one.settings else one.about,
        )
    return drawn


def _network(name: str) -> Network:
    function = models.ARCHITECTURES[name]
    model = function()
    parameters, multiply_adds = models.count(model)
    return Network(
        name=name,
        shape=tuple(model.inputs[0].shape[1:]),
        outputs=model.outputs[0].shape[-1],
        dtype=model.inputs[0].dtype,
        parameters=parameters,
        multiply_adds=multiply_adds,
        about=(inspect.getdoc(function) or "").partition("\n")[0],
        settings=tuple(inspect.signature(function).parameters)[2:],
    )
