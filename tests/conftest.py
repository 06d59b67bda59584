"""A bundle whose answers can be worked out by hand, and a server on it."""

import hashlib
import itertools
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what needs a server on each of its module's FRONTS, but what only grpcio's does."""
    fronts = getattr(metafunc.module, "FRONTS", ())
    if fronts and "front_kind" in metafunc.fixturenames:
        only = metafunc.definition.get_closest_marker("only_grpcio") is not None
        metafunc.parametrize("front_kind", ("grpcio",) if only else fronts)


def pytest_configure() -> None:
    """Have Ctrl-C end what tests start, though a shell that runs them aside had it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let what hostile tests have logged pass from process to process, which takes UTF-8 only."""
    report = yield
    report.sections = [
        (name, text.encode(errors="replace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture
def front_kind() -> str:
    """Give the front that servers have whose module names no FRONTS."""
    return "grpcio"


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


def line_model() -> bytes:
    """Build y = 2x - 1 as ONNX, on float32 (batch, length)."""
    shape: list[str | int] = ["batch", "length"]
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "two"], ["doubled"]),
            helper.make_node("Sub", ["doubled", "one"], ["y"]),
        ],
        "line",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(np.array(value, np.float32), name)
            for name, value in (("two", 2), ("one", 1))
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


MakeBundle = Callable[..., Path]


def write_manifest(
    path: Path,
    manifest: bundle_pb2.BundleManifest,
    edit: Callable[[bundle_pb2.BundleManifest], None],
) -> None:
    """List the two files that are read of every bundle, and write the manifest."""
    for file in ("golden.npz", "model.onnx"):
        content = (path / file).read_bytes()
        manifest.files.add(
            path=file, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content)
        )
    edit(manifest)
    (path / "manifest.json").write_text(json_format.MessageToJson(manifest))


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """Return a function that writes a whole bundle of the tiny model and returns its folder.

    `striped` is added to each logit of that class, to tell versions apart by their answers.
    """

    def make(
        root: Path | None = None,
        *,
        name: str = "tiny",
        version: int = 1,
        model: bytes | None = None,
        striped: float = 0,
        edit: Callable[[bundle_pb2.BundleManifest], None] = lambda manifest: None,
    ) -> Path:
        path = (root or tmp_path / "models") / name / str(version)
        path.mkdir(parents=True)
        more = np.array([0, 0, striped], np.float32)
        (path / "model.onnx").write_bytes(model or tiny_model(BIAS + more))
        images, hostile = tiny_images(12), tiny_images(5, seed=1)
        logits = tiny_logits(images) + more
        labels = logits.argmax(axis=1)
        np.savez(
            path / "golden.npz",
            images=images,
            labels=labels,
            logits=logits,
            hostile_images=hostile,
            hostile_logits=tiny_logits(hostile) + more,
        )
        report = agreement.compare(
            logits,
            logits,
            labels,
            allowed=agreement.budget("float32", logits),
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
        write_manifest(path, manifest, edit)
        return path

    return make


@pytest.fixture
def make_generic_bundle(tmp_path: Path) -> MakeBundle:
    """Return a function that writes a bundle of y = 2x - 1, which is no classifier."""

    def make(
        root: Path | None = None,
        *,
        name: str = "line",
        version: int = 1,
        model: bytes | None = None,
        edit: Callable[[bundle_pb2.BundleManifest], None] = lambda manifest: None,
    ) -> Path:
        path = (root or tmp_path / "models") / name / str(version)
        path.mkdir(parents=True)
        (path / "model.onnx").write_bytes(model or line_model())
        inputs = np.linspace(-8, 8, 24, dtype=np.float32).reshape(8, 3)
        hostile = np.array([[0, 1e6, -1e6]], np.float32)
        np.savez(
            path / "golden.npz",
            inputs=inputs,
            outputs=2 * inputs - 1,
            hostile_inputs=hostile,
            hostile_outputs=2 * hostile - 1,
        )
        report = agreement.compare_outputs(
            2 * inputs - 1,
            2 * inputs - 1,
            allowed=agreement.budget("float32", 2 * inputs - 1),
        )
        report.variant, report.path = "onnx-float32", "model.onnx"
        manifest = bundle_pb2.BundleManifest(
            format=1,
            name=name,
            version=version,
            kind=bundle_pb2.KIND_GENERIC,
            input=bundle_pb2.TensorSpec(name="x", datatype="FP32", shape=(-1, -1)),
            outputs=[bundle_pb2.TensorSpec(name="y", datatype="FP32", shape=(-1, -1))],
            session=bundle_pb2.SessionOptions(graph_optimization="all"),
            served_variant="onnx-float32",
            parity=[report],
        )
        write_manifest(path, manifest, edit)
        return path

    return make


class Folder:
    """What a repository behind a URL is made with, past our own code."""

    def __init__(self, url: str, files: Any) -> None:
        self.url = url
        self._files = files
        self._root = url.partition("://")[2]

    def write(self, path: str, content: bytes) -> None:
        self._files.makedirs(f"{self._root}/{path}".rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(f"{self._root}/{path}", content)

    def read(self, path: str) -> bytes:
        content: bytes = self._files.cat_file(f"{self._root}/{path}")
        return content

    def remove(self, path: str) -> None:
        self._files.rm(f"{self._root}/{path}", recursive=True)

    def list(self) -> list[str]:
        found = self._files.find(self._root)
        return sorted(path[len(self._root) + 1 :] for path in found)

    def copy(self, bundle: Path, without: tuple[str, ...] = ()) -> str:
        """Put the files of NAME/VERSION there, but some of them; return NAME/VERSION."""
        folder = f"{bundle.parent.name}/{bundle.name}"
        for file in bundle.rglob("*"):
            path = file.relative_to(bundle).as_posix()
            if file.is_file() and path not in without:
                self.write(f"{folder}/{path}", file.read_bytes())
        return folder


class ObjectStore:
    """A server of S3's API on a free port, which can be lost and come back with what it had."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self._turn = threading.Lock()  # moto looks whether a file is there, and then writes it
        self._buckets = itertools.count(1)
        self._port = 0
        self.asked: list[tuple[str, str]] = []  # (method, path) of every request
        self.reset()

    def reset(self) -> None:
        self.loses_request: Callable[[str, str], bool] = lambda method, path: False
        self.loses_answer: Callable[[str, str], bool] = lambda method, path: False
        self.ignores_conditions = False
        self.asked.clear()

    @property
    def environment(self) -> dict[str, str]:
        """What the SDK reads, to find this server and not to wait long for it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def start(self) -> None:
        from moto.moto_server.werkzeug_app import MotoRequestHandler
        from werkzeug.serving import make_server

        class Quiet(MotoRequestHandler):
            def log(self, *_: Any) -> None:
                pass

        self._server = make_server(
            "127.0.0.1", self._port, self._answer, threaded=True, request_handler=Quiet
        )
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join(30)
        self._server.server_close()

    def folder(self) -> Folder:
        """Make a bucket; return a folder in it. The environment must be set."""
        import fsspec

        files = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        bucket = f"bucket-{next(self._buckets)}"
        files.mkdir(bucket)
        return Folder(f"s3://{bucket}/models", files)

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if self.ignores_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        with self._turn:
            self.asked.append((method, path))
            if self.loses_request(method, path):
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                return []
            answer = list(self._app(environ, start))
            if self.loses_answer(method, path):
                environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return answer


@pytest.fixture(scope="session")
def the_object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    store.start()
    yield store
    store.stop()


@pytest.fixture
def object_store(the_object_store, monkeypatch) -> ObjectStore:
    """Give the one server; a test that stops it starts it again."""
    the_object_store.reset()
    for name, value in the_object_store.environment.items():
        monkeypatch.setenv(name, value)
    return the_object_store


@pytest.fixture(params=["s3", "file"])
def store_folder(request, tmp_path: Path) -> Folder:
    """Give an empty folder of an object store; and one of this host, behind a URL as well."""
    if request.param == "s3":
        return request.getfixturevalue("object_store").folder()
    import fsspec

    (tmp_path / "store").mkdir()
    return Folder(f"file://{tmp_path}/store", fsspec.filesystem("file"))
