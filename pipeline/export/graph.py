"""A graph while it is rewritten: who makes a tensor, who reads it, what is constant, what is dead.

Knows no pattern; `pipeline.export.passes` decides what is changed.
"""

import itertools
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

DOMAIN = ("", "ai.onnx")  # two names of the standard operators


class Graph:
    """The main graph of a model, on a copy of its nodes: the model itself is never changed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._constants = {constant.name: constant for constant in model.graph.initializer}
        self._changed = False
        self._moved: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []
        for node in model.graph.node:
            self.nodes.append(onnx.NodeProto())
            self.nodes[-1].CopyFrom(node)

    def model(self) -> onnx.ModelProto:
        """Return the model with the changes, and without what nothing reads any more.

        Shapes inside the graph are left out, they may have changed. The model as it was given, if
        there was no change.
        """
        if not self._changed:
            return self._model
        self._prune()
        read = self._public.union(*(node.input for node in self.nodes))
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(
            constant for name, constant in self._constants.items() if name in read
        )
        return model

    def find(self, *op_types: str) -> list[onnx.NodeProto]:
        """Return the nodes of these standard operators, in the order in which they run."""
        return [node for node in self.nodes if is_a(node, *op_types)]

    def maker(self, tensor: str) -> onnx.NodeProto | None:
        """Return the node that makes a tensor; None for a constant or an input."""
        return next((node for node in self.nodes if tensor in node.output), None)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """Return the nodes of this graph that read a tensor."""
        return [node for node in self.nodes if tensor in node.input]

    def is_private(self, tensor: str) -> bool:
        """Say whether `readers` are all that read it: no output, no subgraph that reaches out."""
        return tensor not in self._public

    def constant(self, tensor: str) -> NDArray[np.generic] | None:
        """Return a constant's value; None if the tensor is none, or may be given with a call."""
        if tensor not in self._constants or tensor in self._inputs:
            return None
        return numpy_helper.to_array(self._constants[tensor])

    def weights(self, tensor: str) -> NDArray[np.float32] | None:
        """Return a constant of float32; None for any other tensor."""
        value = self.constant(tensor)
        return value.astype(np.float32) if value is not None and value.dtype == np.float32 else None

    def shape(self, tensor: str) -> tuple[int | None, ...] | None:
        """Return a tensor's sizes, each None where it is open, as the batch is; None if unknown."""
        return None if tensor in self._moved else self._shapes.get(tensor)

    def give(self, node: onnx.NodeProto, index: int, value: NDArray[np.float32]) -> None:
        """Give a node a constant of its own; others that read the old one keep it.

        If what comes from the node has another shape then, `shape` does not know.
        """
        node.input[index] = self._keep(node.input[index], value)
        self._changed = True

    def become(
        self, node: onnx.NodeProto, op_type: str, inputs: list[str], **attributes: int
    ) -> None:
        """Turn a node into another operator that makes a tensor of the same name."""
        del node.input[:], node.attribute[:]
        node.op_type = op_type
        node.input.extend(inputs)
        node.attribute.extend(helper.make_attribute(*item) for item in attributes.items())
        self._changed = True

    def bypass(self, node: onnx.NodeProto, index: int) -> None:
        """Let what reads a node's output read one of its inputs instead, and drop the node."""
        for reader in self.readers(node.output[0]):
            for place, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[place] = node.input[index]
        self.nodes.remove(node)
        self._changed = True

    def follow(self, node: onnx.NodeProto, op_type: str, *constants: NDArray[np.generic]) -> None:
        """Put an operator behind a node, for all that read the node's output; it keeps the name.

        Args:
            node: has one output.
            op_type: a standard operator.
            constants: what it takes besides that output.
        """
        tensor = node.output[0]
        node.output[0] = self._free(tensor)
        inputs = [node.output[0], *(self._keep(tensor, value) for value in constants)]
        behind = helper.make_node(op_type, inputs, [tensor])
        self.nodes.insert(self.nodes.index(node) + 1, behind)
        self._moved.add(tensor)
        self._changed = True

    def swap(self, above: onnx.NodeProto, index: int, below: onnx.NodeProto) -> None:
        """Let two nodes in a row change places.

        Args:
            above: read by `below` alone.
            index: which of its inputs comes through it.
            below: its first input is the output of `above`.
        """
        between, end = above.output[0], below.output[0]
        below.input[0], below.output[0] = above.input[index], between
        above.input[index], above.output[0] = between, end
        self.nodes.remove(above)
        self.nodes.insert(self.nodes.index(below) + 1, above)
        self._moved.add(between)
        self._changed = True

    @cached_property
    def _inputs(self) -> set[str]:
        return {value.name for value in self._model.graph.input}

    @cached_property
    def _public(self) -> set[str]:
        """What is read by more than the nodes of this graph."""
        reached = itertools.chain.from_iterable(_reached(node) for node in self.nodes)
        return {value.name for value in self._model.graph.output}.union(reached)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int | None, ...]]:
        graph = onnx.shape_inference.infer_shapes(self._model).graph
        return {
            value.name: tuple(
                size.dim_value if size.HasField("dim_value") else None
                for size in value.type.tensor_type.shape.dim
            )
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.HasField("shape")
        }

    def _keep(self, name: str, value: NDArray[np.generic]) -> str:
        """Add a constant; return what it is called, which is like a name."""
        free = self._free(name)
        self._constants[free] = numpy_helper.from_array(np.ascontiguousarray(value), free)
        return free

    def _free(self, name: str) -> str:
        """Return a name like another that nothing has."""
        names = (f"{name}_{number}" for number in itertools.count(1))
        return next(name for name in names if not self._is_taken(name))

    def _is_taken(self, name: str) -> bool:
        return name in self._constants or bool(self.readers(name)) or self.maker(name) is not None

    def _prune(self) -> None:
        while True:
            read = self._public.union(*(node.input for node in self.nodes))
            alive = [node for node in self.nodes if read.intersection(node.output)]
            if len(alive) == len(self.nodes):
                return
            self.nodes = alive


def is_a(node: onnx.NodeProto | None, *op_types: str) -> bool:
    """Say whether there is a node, and it is one of these standard operators."""
    return node is not None and node.domain in DOMAIN and node.op_type in op_types


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """Return an attribute's value; the default if the node does not have it."""
    values = (helper.get_attribute_value(item) for item in node.attribute if item.name == name)
    return next(values, default)


def _reached(node: onnx.NodeProto) -> Iterator[str]:
    """Yield every tensor that a node's subgraphs read, their own ones too."""
    for item in node.attribute:
        yield from (value.name for value in item.g.output)
        for inner in item.g.node:
            yield from inner.input
            yield from _reached(inner)
