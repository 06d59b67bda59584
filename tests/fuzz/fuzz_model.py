"""Bytes as model.onnx, signed in the manifest: the bundle is read, or refused in one sentence.

What is taken is read by onnx too, and may have nothing outside the file there either.
"""

import contextlib
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto, helper

from service import bundle, model_file
from service.errors import BundleError
from tests.fuzz import mutate, signed
from tests.fuzz.promise import check_line, check_told

READ_ONE_OF = 64  # the rest of a bundle takes ten times as long


@contextlib.contextmanager
def running(path: Path) -> Iterator[Callable[[bytes], None]]:
    """Yield what reads the bundle with other bytes as its model."""
    write = signed.writer(path, bundle.MODEL)
    source = bundle.shown(path, bundle.MODEL)

    def one(content: bytes) -> None:
        try:
            model_file.check(content, source)
        except BundleError as error:
            check_line(str(error))
            check_told(str(error), content, path.parents[1])
            return
        if zlib.crc32(content) % READ_ONE_OF == 0:
            write(content)
            bundle.read(path)
        check_inside(content)

    yield one


def check_inside(content: bytes) -> None:
    """Walk over everything that onnx reads."""
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:  # of parts that the check has no need to read
        return
    for part in _parts(model):
        assert not isinstance(part, onnx.SparseTensorProto)
        if isinstance(part, TensorProto):
            assert not part.external_data
            assert part.data_location == TensorProto.DEFAULT


def seeds(path: Path) -> list[bytes]:
    """Return the bundle's model, and one with a subgraph, a function and every kind of tensor."""
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    outside = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    outside.data_location = TensorProto.EXTERNAL
    outside.external_data.add(key="location", value="w.bin")
    inner = helper.make_graph(
        [helper.make_node("Constant", [], ["y"], value=tensor)], "inner", [], []
    )
    branch = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    many = helper.make_node("Other", [], ["y"], domain="o", values=[tensor], bodies=[inner])
    function = helper.make_function(
        "o", "f", [], ["y"], [branch], [helper.make_opsetid("", 17)], ["a"]
    )
    function.attribute_proto.append(helper.make_attribute("b", inner))
    model = helper.make_model(
        helper.make_graph([branch, many], "g", [], [], initializer=[tensor]), functions=[function]
    )
    model.training_info.add(algorithm=inner, initialization=inner)
    bad = onnx.ModelProto.FromString(model.SerializeToString())
    bad.graph.initializer.append(outside)
    bad.graph.sparse_initializer.add(values=tensor)
    made = [(path / bundle.MODEL).read_bytes()]
    return made + [one.SerializeToString() for one in (model, bad)]


def change(content: bytes, rng: random.Random, some: mutate.Bytes) -> bytes:
    """Change a model's fields."""
    return mutate.message(content, onnx.ModelProto, rng, some).SerializePartialToString()


def _parts(message: Message) -> Iterator[Message]:
    waiting = [message]
    while waiting:
        part = waiting.pop()
        yield part
        for field, value in part.ListFields():
            if field.message_type is not None:
                waiting += value if field.is_repeated else [value]
