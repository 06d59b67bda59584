"""Bundles to measure the server with, made in a moment: nothing here was trained.

Decides what the models cost and which tensors they have; their answers mean nothing.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import json_format
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from protos import bundle_pb2
from service import agreement, bundle
from service.session import Session, Tensor

NAME = "measured"
OPSET = 17
IR_VERSION = 8
GOLDEN_ROWS = 8
SIDE = 28  # of small's images, as Fashion-MNIST's
CLASSES = 10
FEATURES = 16  # of a row of slow's
POSITIONS = 16  # each row becomes so many: few enough for the caches to hold a batch of them
WIDTH = 256
CALIBRATION_LAYERS = 64
SESSION = bundle_pb2.SessionOptions(graph_optimization="all")


@dataclass(frozen=True, slots=True)
class Model:
    """A model and what its bundle says of it."""

    content: bytes
    input: bundle_pb2.TensorSpec
    outputs: tuple[bundle_pb2.TensorSpec, ...]  # parity is measured on the first
    rows: NDArray[np.generic]  # some inputs


def small() -> Model:
    """Return a small convolutional network: uint8 (batch, 28, 28, 1) to float32 (batch, 10)."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "kernels"], ["edges"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["edges"], ["found"]),
        helper.make_node("MaxPool", ["found"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    features = 8 * (SIDE // 2) ** 2
    weights = {
        "kernels": rng.normal(0, 0.01, (8, 1, 3, 3)),
        "weights": rng.normal(0, features**-0.5, (features, CLASSES)),
    }
    image = bundle_pb2.TensorSpec(name="image", datatype="UINT8", shape=(-1, SIDE, SIDE, 1))
    logits = bundle_pb2.TensorSpec(name="logits", datatype="FP32", shape=(-1, CLASSES))
    rows = rng.integers(0, 256, (GOLDEN_ROWS, SIDE, SIDE, 1), np.uint8)
    return Model(_onnx(nodes, weights, image, logits), image, (logits,), rows)


def exported(content: bytes, rows: NDArray[np.generic]) -> Model:
    """Return a model that was exported to ONNX, with some rows that it takes."""
    session = Session(content, SESSION, threads=1)
    (taken,), given = session.inputs, session.outputs
    return Model(content, _spec(taken), tuple(_spec(one) for one in given), rows)


def slow(row_ms: float) -> Model:
    """Return a model whose every row costs at least so much on one thread.

    float32 (batch, 16) to float32 (batch, 4). Each row is a matrix of its own that goes through
    square layers, so that a batch costs its rows' sum, and more once it leaves the caches.
    """
    layers = CALIBRATION_LAYERS
    layer_ms = _row_ms(_layered(layers)) / layers
    return _layered(max(1, round(row_ms / layer_ms)))


def write(root: Path, model: Model, number: int = 1) -> Path:
    """Write a version of a bundle of this model under a repository's root; return its folder."""
    path = root / NAME / str(number)
    path.mkdir(parents=True)
    outputs = _session(model).run(model.rows)[model.outputs[0].name].astype(np.float32)
    (path / bundle.MODEL).write_bytes(model.content)
    np.savez(
        path / bundle.GOLDEN,
        inputs=model.rows,
        outputs=outputs,
        hostile_inputs=model.rows,
        hostile_outputs=outputs,
    )
    allowed = agreement.budget("float32", outputs)
    report = agreement.compare_outputs(outputs, outputs, allowed=allowed)
    report.variant, report.path = "onnx-float32", bundle.MODEL
    manifest = bundle_pb2.BundleManifest(
        format=bundle.FORMAT,
        name=NAME,
        version=number,
        kind=bundle_pb2.KIND_GENERIC,
        input=model.input,
        outputs=model.outputs,
        session=SESSION,
        served_variant=report.variant,
        parity=[report],
    )
    for name in (bundle.GOLDEN, bundle.MODEL):
        file = path / name
        size_bytes = file.stat().st_size
        manifest.files.add(path=name, sha256=bundle.file_sha256(file), size_bytes=size_bytes)
    (path / bundle.MANIFEST).write_text(json_format.MessageToJson(manifest))
    return path


def _layered(layers: int) -> Model:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "spread"], ["spread_out"]),
        helper.make_node("Reshape", ["spread_out", "matrix"], ["layer_0"]),
    ]
    for layer in range(layers):
        product, after = f"product_{layer}", f"layer_{layer + 1}"
        nodes += [
            helper.make_node("MatMul", [f"layer_{layer}", "square"], [product]),
            helper.make_node("Tanh" if layer % 4 == 0 else "Relu", [product], [after]),
        ]
    nodes += [
        helper.make_node("ReduceMean", [f"layer_{layers}"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("MatMul", ["mean", "head"], ["y"]),
    ]
    weights = {
        "spread": rng.normal(0, FEATURES**-0.5, (FEATURES, POSITIONS * WIDTH)),
        "square": rng.normal(0, (2 / WIDTH) ** 0.5, (WIDTH, WIDTH)),
        "head": rng.normal(0, 1, (WIDTH, 4)),
        "matrix": np.array([-1, POSITIONS, WIDTH], np.int64),
    }
    x = bundle_pb2.TensorSpec(name="x", datatype="FP32", shape=(-1, FEATURES))
    y = bundle_pb2.TensorSpec(name="y", datatype="FP32", shape=(-1, 4))
    rows = rng.normal(0, 1, (GOLDEN_ROWS, FEATURES)).astype(np.float32)
    return Model(_onnx(nodes, weights, x, y), x, (y,), rows)


def _row_ms(model: Model) -> float:
    """Return the milliseconds of a call of one row, the best of some tries."""
    session = _session(model)
    seconds = []
    for _ in range(40):
        started_s = time.perf_counter()
        session.run(model.rows[:1])
        seconds.append(time.perf_counter() - started_s)
    return min(seconds) * 1000


def _spec(tensor: Tensor) -> bundle_pb2.TensorSpec:
    return bundle_pb2.TensorSpec(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def _session(model: Model) -> Session:
    return Session(model.content, SESSION, threads=1)


def _onnx(
    nodes: list[onnx.NodeProto],
    weights: Mapping[str, NDArray[np.generic]],
    taken: bundle_pb2.TensorSpec,
    given: bundle_pb2.TensorSpec,
) -> bytes:
    values = [
        helper.make_tensor_value_info(
            spec.name,
            TensorProto.UINT8 if spec.datatype == "UINT8" else TensorProto.FLOAT,
            ["batch", *spec.shape[1:]],
        )
        for spec in (taken, given)
    ]
    initializers = [
        numpy_helper.from_array(
            array if array.dtype == np.int64 else array.astype(np.float32), name
        )
        for name, array in weights.items()
    ]
    graph = helper.make_graph(nodes, NAME, values[:1], values[1:], initializers)
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
