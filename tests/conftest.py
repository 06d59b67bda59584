"""A bundle whose answers can be worked out by hand, and a server on it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import json_format
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from protos import bundle_pb2
from service import agreement

LABELS = ("dark", "light", "striped")
SHAPE = (2, 2, 1)
# dark falls and light rises with every pixel; striped is the left column less the right one.
ROWS = [[-0.25, 0.25, 0.25], [-0.25, 0.25, -0.25], [-0.25, 0.25, 0.25], [-0.25, 0.25, -0.25]]
WEIGHTS = np.array(ROWS, np.float32)
BIAS = np.array([127, -127, 0], np.float32)


def tiny_logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Work out the tiny model's logits in numpy: (rows, 2, 2, 1) to (rows, 3)."""
    logits: NDArray[np.float32] = images.reshape(len(images), 4).astype(np.float32) @ WEIGHTS + BIAS
    return logits


def tiny_images(rows: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows, *SHAPE), np.uint8)


def tiny_model(bias: NDArray[np.float32] = BIAS) -> bytes:
    """Build the tiny model as ONNX."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
            helper.make_node("Flatten", ["pixels"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weights", "bias"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=-1),
        ],
        "tiny",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", *SHAPE])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", len(LABELS)])
            for name in ("probabilities", "logits")
        ],
        [numpy_helper.from_array(WEIGHTS, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


@dataclass(frozen=True)
class Tiny:
    """The tiny model, for tests that cannot import this file."""

    labels: tuple[str, ...] = LABELS
    shape: tuple[int, int, int] = SHAPE
    logits: Callable[[NDArray[np.uint8]], NDArray[np.float32]] = tiny_logits
    images: Callable[..., NDArray[np.uint8]] = tiny_images  # (rows, seed=0)
    model: Callable[..., bytes] = tiny_model  # (bias=BIAS)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return Tiny()


MakeBundle = Callable[..., Path]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Return a function that writes a whole bundle of the tiny model and returns its folder."""

    def make(
        root: Path | None = None,
        *,
        name: str = "tiny",
        version: int = 1,
        model: bytes | None = None,
        edit: Callable[[bundle_pb2.BundleManifest], None] = lambda manifest: None,
    ) -> Path:
        path = (root or tmp_path / "models") / name / str(version)
        path.mkdir(parents=True)
        (path / "model.onnx").write_bytes(model or tiny_model())
        images, hostile = tiny_images(12), tiny_images(5, seed=1)
        labels = tiny_logits(images).argmax(axis=1)
        np.savez(
            path / "golden.npz",
            images=images,
            labels=labels,
            logits=tiny_logits(images),
            hostile_images=hostile,
            hostile_logits=tiny_logits(hostile),
        )
        report = agreement.compare(
            tiny_logits(images),
            tiny_logits(images),
            labels,
            allowed=agreement.budget("float32", tiny_logits(images)),
            class_names=list(LABELS),
        )
        report.variant, report.path = "onnx-float32", "model.onnx"
        manifest = bundle_pb2.BundleManifest(
            format=1,
            name=name,
            version=version,
            kind=bundle_pb2.KIND_CLASSIFIER,
            input=bundle_pb2.TensorSpec(name="image", datatype="UINT8", shape=(-1, *SHAPE)),
            outputs=[
                bundle_pb2.TensorSpec(name=output, datatype="FP32", shape=(-1, len(LABELS)))
                for output in ("probabilities", "logits")
            ],
            labels=LABELS,
            session=bundle_pb2.SessionOptions(graph_optimization="all"),
            served_variant="onnx-float32",
            parity=[report],
        )
        for file in ("golden.npz", "model.onnx"):
            content = (path / file).read_bytes()
            manifest.files.add(
                path=file, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
            )
        edit(manifest)
        (path / "manifest.json").write_text(json_format.MessageToJson(manifest))
        return path

    return make
