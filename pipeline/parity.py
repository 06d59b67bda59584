"""Hold every export against the original model, over the whole test set and hostile inputs.

The ONNX file is run by the code that serves, with the options that serve it. A variant over its
budget fails the run.
"""

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from numpy.typing import NDArray

from pipeline import dataset, device
from pipeline.errors import ParityError
from pipeline.records import Checked, Dataset, Exports, Trained
from protos import bundle_pb2
from service import agreement
from service.host import cores
from service.session import RUNTIME, Session

log = logging.getLogger(__name__)
BATCH_ROWS = 256
HOSTILE_BATCHES = (1, 2, 7, 33, 256)  # below, between and above what kernels are tuned for
NOISE_SEED = 42
SERVED_VARIANT = "onnx-float32"
Images = NDArray[np.uint8]
Logits = NDArray[np.float32]
Runner = Callable[[list[Images]], tuple[list[Logits], list[float]]]  # batches in, and seconds out


def session_options() -> bundle_pb2.SessionOptions:
    """Return the options that a bundle is measured and served with."""
    return bundle_pb2.SessionOptions(graph_optimization="all")


def check(trained: Trained, exports: Exports, data: Dataset, folder: Path) -> Checked:
    """Measure every export and refuse the run if one is over its budget.

    Args:
        trained: the original, the reference of all.
        exports: what to measure.
        data: its test images are asked about, all of them.
        folder: for the reports and answers.

    Raises:
        ParityError: a variant is over its budget; the reports of all are written all the same.
    """
    device.prepare()
    folder.mkdir(parents=True, exist_ok=True)
    test = dataset.load(data).test
    hostile = hostile_images(test.images.shape[1:])
    original = keras.models.load_model(trained.path)
    reference = original.predict(test.images, batch_size=BATCH_ROWS, verbose=0)
    answers = {
        "reference": reference,
        "hostile_images": hostile,
        "hostile_reference": original.predict(hostile, batch_size=BATCH_ROWS, verbose=0),
    }
    allowed = agreement.budget("float32", reference)
    variants: tuple[tuple[str, str, Path, Runner], ...] = (
        ("saved-model", f"tensorflow {tf.__version__}", exports.saved_model,
         _saved_model(exports.saved_model)),
        ("tflite-float32", f"ai-edge-litert {version('ai-edge-litert')}", exports.tflite,
         _tflite(exports.tflite)),
        (SERVED_VARIANT, RUNTIME, exports.onnx, _onnx(exports.onnx)),
    )  # fmt: skip
    reports = []
    for name, runtime, path, run in variants:
        seconds, logits, hostile_logits = _answer(run, test.images, hostile)
        report = agreement.compare(
            reference, logits, test.labels, allowed=allowed, class_names=list(data.labels)
        )
        report.variant, report.runtime = name, runtime
        report.size_bytes = size_bytes(path)
        report.images_per_second, report.batch_rows = len(logits) / seconds, BATCH_ROWS
        _add_hostile(report, answers["hostile_reference"], hostile_logits)
        answers[name] = logits
        reports.append(_write(report, folder))
        log.info(
            "%s: max |Δlogit| %.2g of %.2g allowed, agreement %.2f %%, %d flips: %s",
            name, report.logits.max, allowed.max_logit, 100 * report.agreement,
            report.flips_explained + report.flips_unexplained,
            "passed" if report.passed else f"failed, {report.failure}",
        )  # fmt: skip
    np.savez(folder / "answers.npz", **answers)
    failures = [f"{r.variant}: {r.failure}" for r in map(read_report, reports) if not r.passed]
    if failures:
        raise ParityError(f"nothing is published, {'; '.join(failures)}; reports are in {folder}")
    return Checked(
        reports=tuple(reports),
        answers=folder / "answers.npz",
        served_variant=SERVED_VARIANT,
        precision=allowed.precision,
        scale=allowed.scale,
    )


def hostile_images(shape: tuple[int, ...]) -> Images:
    """Return all-black, all-white, two checkerboards, and noise up to the sum of the odd batches.

    Args:
        shape: (height, width, channels) of one image.
    """
    height, width, _ = shape
    checkers = np.indices((height, width)).sum(axis=0)[..., None] % 2 * 255
    patterns = [np.zeros(shape), np.full(shape, 255), checkers, 255 - checkers]
    fixed = np.stack([np.broadcast_to(one, shape) for one in patterns]).astype(np.uint8)
    random = np.random.default_rng(NOISE_SEED)
    noise = random.integers(0, 256, (sum(HOSTILE_BATCHES) - len(fixed), *shape), np.uint8)
    return np.concatenate([fixed, noise])


def read_report(path: Path) -> bundle_pb2.ParityReport:
    """Read a report that `check` wrote."""
    return json_format.Parse(path.read_bytes(), bundle_pb2.ParityReport())


def size_bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _answer(run: Runner, images: Images, hostile: Images) -> tuple[float, Logits, Logits]:
    """Run the hostile inputs first, which warms up, then every image; seconds are of the images."""
    starts = np.cumsum((0, *HOSTILE_BATCHES[:-1]))
    odd = [hostile[s : s + rows] for s, rows in zip(starts, HOSTILE_BATCHES, strict=True)]
    even = [images[start : start + BATCH_ROWS] for start in range(0, len(images), BATCH_ROWS)]
    logits, seconds = run([*odd, *even])
    first = len(odd)
    return (
        sum(seconds[first:]),
        np.concatenate(logits[first:]),
        np.concatenate(logits[:first]),
    )


def _add_hostile(report: bundle_pb2.ParityReport, reference: Logits, logits: Logits) -> None:
    report.hostile.rows = len(logits)
    report.hostile.batch_sizes.extend(HOSTILE_BATCHES)
    report.hostile.max_logit = agreement.difference(reference, logits).max
    agreement.judge(report)


def _write(report: bundle_pb2.ParityReport, folder: Path) -> Path:
    path = folder / f"{report.variant}.json"
    path.write_text(json_format.MessageToJson(report, preserving_proto_field_name=True))
    return path


def _timed(answer: Callable[[Images], Logits]) -> Runner:
    def run(batches: list[Images]) -> tuple[list[Logits], list[float]]:
        logits, seconds = [], []
        for batch in batches:
            started_s = time.monotonic()
            logits.append(answer(batch))
            seconds.append(time.monotonic() - started_s)
        return logits, seconds

    return run


def _saved_model(folder: Path) -> Runner:
    loaded = tf.saved_model.load(str(folder))

    def answer(batch: Images) -> Logits:
        serve = loaded.signatures["serving_default"]  # `loaded` owns the variables: keep it alive
        logits: Logits = serve(image=tf.constant(batch))["logits"].numpy()
        return logits

    return _timed(answer)


def _onnx(path: Path) -> Runner:
    session = Session(path.read_bytes(), session_options(), threads=cores())
    return _timed(lambda batch: session.run(batch)["logits"].astype(np.float32, copy=False))


def _tflite(path: Path) -> Runner:
    def run(batches: list[Images]) -> tuple[list[Logits], list[float]]:
        with tempfile.TemporaryDirectory() as folder:
            images, answers = Path(folder, "images.npz"), Path(folder, "answers.npz")
            np.savez(images, *batches)
            command = (sys.executable, "-m", "pipeline.litert", path, images, answers, cores())
            done = subprocess.run(  # noqa: S603  our own module
                [str(word) for word in command], capture_output=True, text=True, check=False
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise ParityError(f"{path.name} cannot be run by TFLite's runtime: {last}")
            with np.load(answers, allow_pickle=False) as arrays:
                logits, seconds = arrays["logits"], arrays["seconds"]
        borders = np.cumsum([len(batch) for batch in batches])[:-1]
        return np.split(logits, borders), [float(one) for one in seconds]

    return run
