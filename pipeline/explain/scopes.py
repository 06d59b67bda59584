"""Which Keras layer each operator of a serving graph is of, from the scopes of the graph alone.

A SavedModel keeps no list of its layers, and the names of its variables leave out every layer that
has none. The graph has a scope for each call of a layer. Keras opens it twice, to build and then to
call, and TensorFlow numbers a scope that is opened again: the operators of a layer `conv` are in
`conv_1`, those of its second call in `conv_3`, and `conv` and `conv_2` are empty. So a numbered
scope is a layer's if the one numbered before it is empty; `moments_1` inside a layer is none, for
there are operators in `moments`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

FUNCTION = re.compile(r"(Stateful)?PartitionedCall(_\d+)?|Func")  # that was inlined: no layer
NUMBERED = re.compile(r"(.+)_([1-9]\d*)")
Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the model an operator is."""

    layer: str  # such as conv, of a nested model block/conv; without one as `inside`
    inside: str  # the operator's name from the model's own scope on, such as conv_1/Relu


def places(operators: Iterable[str]) -> dict[str, Place]:
    """Return the place of every operator of a graph, by name.

    What all layers are inside is the model, and no part of a layer's name: its scope, and that of
    one that it only wraps.

    Args:
        operators: the names of all of them; a layer is told by which scopes are empty.
    """
    paths = {name: _path(name) for name in operators}
    filled = {path[:depth] for path in paths.values() for depth in range(1, len(path))}
    layers = {name: _layer(path, filled) for name, path in paths.items()}
    model = _model(set(layers.values()))
    return {name: _place(path, layers[name], model) for name, path in paths.items()}


def _path(name: str) -> Parts:
    *scopes, operator = name.split("/")
    return (*(scope for scope in scopes if not FUNCTION.fullmatch(scope)), operator)


def _layer(path: Parts, filled: set[Parts]) -> Parts:
    """Return the names of the innermost layer that an operator is in and of all around it."""
    found: Parts = ()
    names: list[str] = []
    for depth, scope in enumerate(path[:-1]):
        numbered = NUMBERED.fullmatch(scope)
        stem, number = (numbered[1], int(numbered[2])) if numbered else (scope, 0)
        before = stem if number == 1 else f"{stem}_{number - 1}"
        if numbered and (*path[:depth], before) not in filled:
            found = (*names, stem)
            names.append(stem)
        else:
            names.append(scope)
    return found


def _model(layers: set[Parts]) -> int:
    """Return how many scopes are around all layers; a lone layer is not taken for the model."""
    depth = 0
    while len({layer[depth] for layer in layers if len(layer) > depth}) == 1 and any(
        len(layer) > depth + 1 for layer in layers
    ):
        depth += 1
    return depth


def _place(path: Parts, layer: Parts, model: int) -> Place:
    inside = "/".join(path[min(len(layer), model) :])
    return Place("/".join(layer[model:]) or inside, inside)
