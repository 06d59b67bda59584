"""Hold every export against the original model, over the whole test set and hostile inputs.

ONNX files are run by the code that serves, with the options that serve them. A variant over its
budget is reported and left out; if it is required, it fails the run.
"""

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from numpy.typing import NDArray

from pipeline import dataset, device
from pipeline.errors import ParityError
from pipeline.records import Checked, Dataset, Exports, Scores, Trained, Variant
from protos import bundle_pb2
from service import agreement, bundle
from service.errors import ServiceError
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
RUNTIMES = {
    "saved_model": f"tensorflow {tf.__version__}",
    "tflite": f"ai-edge-litert {version('ai-edge-litert')}",
    "onnx": RUNTIME,
}


@dataclass(frozen=True, slots=True)
class Questions:
    """What every variant is asked, and what the original answers."""

    images: Images
    labels: NDArray[np.uint8]
    class_names: tuple[str, ...]
    hostile: Images
    reference: Logits
    hostile_reference: Logits


def session_options(session: tuple[tuple[str, str], ...] = ()) -> bundle_pb2.SessionOptions:
    """Return the options that a variant is measured and served with.

    Args:
        session: what its kind needs besides, by onnxruntime's own names.
    """
    return bundle_pb2.SessionOptions(graph_optimization="all", config=dict(session))


def check(
    trained: Trained,
    exports: Exports,
    data: Dataset,
    folder: Path,
    scores: Scores,
    served: str = SERVED_VARIANT,
) -> Checked:
    """Measure every export; refuse the run if a required one, or the served one, does not pass.

    Args:
        trained: the original, the reference of all.
        exports: what to measure; what could not be exported gets a report that says so.
        data: its test images are asked about, all of them.
        folder: for the reports and answers.
        scores: of the evaluation, which must have been of the same weights.
        served: name of the variant to serve, an ONNX one.

    Raises:
        ParityError: a required variant is over its budget, or the evaluation was of other weights;
            in the first case the reports of all are written all the same.
    """
    device.prepare()
    folder.mkdir(parents=True, exist_ok=True)
    _check_parent(trained, exports, scores)
    asked = questions(trained, data)
    _check_accuracy(asked, scores)
    answers: dict[str, NDArray[np.generic]] = {
        "reference": asked.reference,
        "hostile_images": asked.hostile,
        "hostile_reference": asked.hostile_reference,
    }
    reports = {}
    for variant in exports.variants:
        report, logits = measure(variant, asked)
        if logits is not None:
            answers[variant.name] = logits
        reports[variant.name] = report
        _write(report, folder)
        _log(report)
    np.savez(folder / "answers.npz", allow_pickle=False, **answers)
    needed = [one.name for one in exports.variants if one.required or one.name == served]
    failures = [f"{name}: {reports[name].failure}" for name in needed if not reports[name].passed]
    if failures:
        raise ParityError(f"nothing is published, {'; '.join(failures)}; reports are in {folder}")
    return Checked(
        reports=tuple(folder / f"{name}.json" for name in reports),
        answers=folder / "answers.npz",
        served_variant=served,
        precision=reports[served].budget.precision,
        scale=reports[served].budget.scale,
    )


def questions(trained: Trained, data: Dataset) -> Questions:
    """Ask the original about every test image and the hostile ones."""
    test = dataset.load(data).test
    hostile = hostile_images(test.inputs.shape[1:])
    original = keras.models.load_model(trained.path)
    return Questions(
        images=test.inputs,
        labels=test.targets,
        class_names=data.labels,
        hostile=hostile,
        reference=original.predict(test.inputs, batch_size=BATCH_ROWS, verbose=0),
        hostile_reference=original.predict(hostile, batch_size=BATCH_ROWS, verbose=0),
    )


def measure(variant: Variant, asked: Questions) -> tuple[bundle_pb2.ParityReport, Logits | None]:
    """Ask one variant everything, with the options that would serve it, and judge it.

    Returns:
        Its report, and its logits of the test images; None if it cannot be run, as its report says.
    """
    allowed = agreement.budget(variant.precision, asked.reference)
    report = bundle_pb2.ParityReport(budget=allowed.message(), failure=variant.failure)
    logits: Logits | None = None
    if not variant.failure:
        try:
            seconds, logits, hostile_logits = _answer(runner(variant), asked.images, asked.hostile)
            report = agreement.compare(
                asked.reference,
                logits,
                asked.labels,
                allowed=allowed,
                class_names=list(asked.class_names),
            )
            report.images_per_second, report.batch_rows = len(logits) / seconds, BATCH_ROWS
            _add_hostile(report, asked.hostile_reference, hostile_logits)
        except (ParityError, ServiceError, ValueError) as error:
            report.failure = f"{variant.path.name} cannot be run: {error}"
            logits = None
        report.size_bytes = size_bytes(variant.path)
    report.variant, report.runtime = variant.name, RUNTIMES[variant.format]
    return report, logits


def runner(variant: Variant) -> Runner:
    """Return what answers batches with a variant's file, as it would be served.

    Raises:
        ServiceError: onnxruntime does not load it. TFLite's refusal, a ParityError, comes with the
            first call.
    """
    if variant.format == "onnx":
        return _onnx(variant.path, session_options(variant.session))
    return _tflite(variant.path) if variant.format == "tflite" else _saved_model(variant.path)


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


def _check_parent(trained: Trained, exports: Exports, scores: Scores) -> None:
    """Refuse exports, or a reference, of other weights than those that were evaluated."""
    found = {
        "exported": exports.parent_sha256,
        "held against them": bundle.file_sha256(trained.path),
    }
    for what, digest in found.items():
        if digest != scores.sha256:
            raise ParityError(
                f"nothing is published, the model {what} has sha256 {digest[:12]}…, "
                f"{scores.sha256[:12]}… was evaluated; run again"
            )


def _check_accuracy(asked: Questions, scores: Scores) -> None:
    """Refuse a reference that is not as accurate as the evaluation found it.

    Rows whose two highest logits are closer than rounding may fall either way.
    """
    correct = int((asked.reference.argmax(axis=1) == asked.labels).sum())
    limit = 2 * agreement.budget("float32", asked.reference).max_logit
    ties = int((agreement.margins(asked.reference) <= limit).sum())
    if len(asked.labels) != scores.rows or abs(correct - scores.correct) > ties:
        raise ParityError(
            f"nothing is published, the exported model gets {correct} of {len(asked.labels)} test "
            f"images right, the evaluated one {scores.correct} of {scores.rows}; run again"
        )


def _log(report: bundle_pb2.ParityReport) -> None:
    log.info(
        "%s: max |Δlogit| %.2g of %.2g allowed, agreement %.2f %%, %d flips: %s",
        report.variant, report.logits.max, report.budget.max_logit, 100 * report.agreement,
        report.flips_explained + report.flips_unexplained,
        "passed" if report.passed else f"failed, {report.failure}",
    )  # fmt: skip


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


def _onnx(path: Path, options: bundle_pb2.SessionOptions) -> Runner:
    session = Session(path.read_bytes(), options, threads=cores())
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
                raise ParityError(f"TFLite's runtime says: {last}")
            with np.load(answers, allow_pickle=False) as arrays:
                logits, seconds = arrays["logits"], arrays["seconds"]
        borders = np.cumsum([len(batch) for batch in batches])[:-1]
        return np.split(logits, borders), [float(one) for one in seconds]

    return run
