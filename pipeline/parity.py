"""Hold every export against the original model, over the whole test set and hostile inputs.

ONNX files are run by the code that serves, with the options that serve them. A variant over its
budget is reported and left out; if it is required, it fails the run, once all are reported.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from google.protobuf import json_format
from numpy.typing import NDArray

from pipeline import cost, dataset, device, runtimes
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
SAME_ERROR = 1e-3  # between two mean squared errors of the same weights, as a share
SERVED_VARIANT = "onnx-float32"
BEST = "best"  # instead of a variant's name: the fastest
QUICKER = 0.95  # of float32's time: what takes longer is as fast, within what clocks are worth
LOGITS = "logits"  # the output that is compared, of a classifier; else the only one
Rows = NDArray[Any]  # as the model takes them
Logits = NDArray[np.float32]  # or other outputs, (rows, ...)
Runner = Callable[[list[Rows]], tuple[list[Logits], list[float]]]  # batches in, and seconds out
Measure = Callable[[Variant, Rows, bundle_pb2.SessionOptions], cost.Cost]
RUNTIMES = {
    "saved_model": f"tensorflow {tf.__version__}",
    "tflite": f"ai-edge-litert {version('ai-edge-litert')}",
    "onnx": RUNTIME,
}


@dataclass(frozen=True, slots=True)
class Questions:
    """What every variant is asked, and what the original answers."""

    inputs: Rows
    targets: NDArray[Any]
    class_names: tuple[str, ...]  # empty: outputs are judged by their differences alone
    hostile: Rows
    reference: Logits
    hostile_reference: Logits


def session_options(session: tuple[tuple[str, str], ...] = ()) -> bundle_pb2.SessionOptions:
    """Return the options that a variant is measured and served with.

    Args:
        session: what its kind needs besides, by onnxruntime's own names.
    """
    return bundle_pb2.SessionOptions(graph_optimization="all", config=dict(session))


def check(  # noqa: PLR0913  what was trained, exported and evaluated, and what is to come of it
    trained: Trained,
    exports: Exports,
    data: Dataset,
    folder: Path,
    scores: Scores,
    serve: str = SERVED_VARIANT,
    measure_cost: Measure = cost.measure,
) -> Checked:
    """Measure every export; refuse the run if a required one, or the served one, does not pass.

    Args:
        trained: the original, the reference of all.
        exports: what to measure; what could not be exported gets a report that says so.
        data: its test rows are asked about, all of them.
        folder: for the reports and answers.
        scores: of the evaluation, which must have been of the same weights.
        serve: name of the variant to serve, an ONNX one; or `BEST`, as `fastest` says.
        measure_cost: says what a variant costs, one after the other.

    Raises:
        ParityError: a required variant is over its budget, or the evaluation was of other weights;
            in the first case the reports of all are written all the same.
    """
    device.prepare()
    folder.mkdir(parents=True, exist_ok=True)
    _check_parent(trained, exports, scores)
    asked = questions(trained, data)
    _check_accuracy(asked, scores)
    reports, answers = _measured(exports, asked)
    _add_costs(exports, reports, asked.inputs, measure_cost)
    for report in reports.values():
        _write(report, folder)
    np.savez(folder / "answers.npz", allow_pickle=False, **answers)
    served = fastest(reports) if serve == BEST else serve
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


def fastest(reports: Mapping[str, bundle_pb2.ParityReport]) -> str:
    """Return the ONNX variant that passed and answers 64 rows soonest, then one row.

    By the medians that were measured here. `SERVED_VARIANT` unless another is faster beyond doubt:
    with 64 rows, or with one row while both take as long for 64.
    """
    rivals = [one for one in reports.values() if one.passed and one.variant.startswith("onnx-")]
    usual = reports[SERVED_VARIANT]
    for rows in (64, 1):
        rivals = [one for one in rivals if _p50(one, rows) and _p50(usual, rows)]
        if not rivals:
            break
        first = min(rivals, key=lambda one: _p50(one, rows))
        if _p50(first, rows) < QUICKER * _p50(usual, rows):
            return first.variant
        rivals = [one for one in rivals if QUICKER * _p50(one, rows) <= _p50(usual, rows)]
    return SERVED_VARIANT


def _p50(report: bundle_pb2.ParityReport, rows: int) -> float:
    """Return the median seconds of a call; 0 if it was not measured."""
    return next((one.p50_seconds for one in report.latencies if one.rows == rows), 0.0)


def questions(trained: Trained, data: Dataset) -> Questions:
    """Ask the original about every test row and the hostile ones."""
    test = dataset.load(data).test
    hostile = hostile_rows(test.inputs)
    original = keras.models.load_model(trained.path, compile=False)
    return Questions(
        inputs=test.inputs,
        targets=test.targets,
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
            seconds, logits, hostile_logits = _answer(runner(variant), asked.inputs, asked.hostile)
            report = agreement.compare_by_kind(
                asked.reference,
                logits,
                asked.targets,
                allowed=allowed,
                class_names=list(asked.class_names),
            )
            report.images_per_second, report.batch_rows = len(logits) / seconds, BATCH_ROWS
            agreement.add_hostile(report, asked.hostile_reference, hostile_logits)
            report.hostile.batch_sizes.extend(HOSTILE_BATCHES)
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


def hostile_rows(inputs: Rows) -> Rows:
    """Return what a model of such inputs is asked besides them: images, or other numbers.

    Args:
        inputs: of the test set: uint8 images, or floats of any shape.
    """
    if inputs.dtype == np.uint8:
        return hostile_images(inputs.shape[1:])
    return hostile_numbers(inputs)


def hostile_numbers(inputs: Rows) -> Rows:
    """Return zeros, ones, the ends of a range twice as wide as the inputs', and noise over it.

    Beyond that nothing is asked: a model that does not classify promises nothing far outside its
    data, where some overflow.
    """
    shape, low, high = inputs.shape[1:], float(inputs.min()), float(inputs.max())
    low, high = low - (high - low) / 2, high + (high - low) / 2
    fixed = np.stack([np.full(shape, value) for value in (0, 1, low, high)])
    random = np.random.default_rng(NOISE_SEED)
    noise = random.uniform(low, high, (sum(HOSTILE_BATCHES) - len(fixed), *shape))
    return np.concatenate([fixed, noise]).astype(inputs.dtype)


def hostile_images(shape: tuple[int, ...]) -> NDArray[np.uint8]:
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
    if not asked.class_names:
        _check_error(asked, scores)
        return
    correct = int((asked.reference.argmax(axis=1) == asked.targets).sum())
    limit = 2 * agreement.budget("float32", asked.reference).max_logit
    ties = int((agreement.margins(asked.reference) <= limit).sum())
    if len(asked.targets) != scores.rows or abs(correct - scores.correct) > ties:
        raise ParityError(
            f"nothing is published, the exported model gets {correct} of {len(asked.targets)} test "
            f"images right, the evaluated one {scores.correct} of {scores.rows}; run again"
        )


def _check_error(asked: Questions, scores: Scores) -> None:
    """Refuse a reference whose mean squared error is not the one of the evaluation."""
    apart = (asked.reference.astype(np.float64) - asked.targets) ** 2
    largest = float(np.square(asked.reference, dtype=np.float64).max())
    if len(apart) != scores.rows or not np.isclose(
        apart.mean(), scores.loss, rtol=SAME_ERROR, atol=SAME_ERROR**2 * largest
    ):
        raise ParityError(
            f"nothing is published, the exported model has a squared error of {apart.mean():.6g} "
            f"on {len(apart)} rows, the evaluated one {scores.loss:.6g} on {scores.rows}; run again"
        )


def _log(report: bundle_pb2.ParityReport) -> None:
    if not report.accuracy.rows:
        log.info("%s: failed, %s", report.variant, report.failure)
        return
    by_share = report.budget.precision == "int8"  # judged by a percentile
    log.info(
        "%s: %s |Δlogit| %.2g of %.2g allowed, agreement %.2f %%, %d flips: %s",
        report.variant, "p99.9" if by_share else "max",
        agreement.judged(report),
        report.budget.max_logit, 100 * report.agreement,
        report.flips_explained + report.flips_unexplained,
        "passed" if report.passed else f"failed, {report.failure}",
    )  # fmt: skip


def _measured(
    exports: Exports, asked: Questions
) -> tuple[dict[str, bundle_pb2.ParityReport], dict[str, Rows]]:
    """Return a report of every variant, and its answers beside the reference's."""
    answers: dict[str, Rows] = {
        "reference": asked.reference,
        "hostile_inputs": asked.hostile,
        "hostile_reference": asked.hostile_reference,
    }
    reports = {}
    for variant in exports.variants:
        reports[variant.name], logits = measure(variant, asked)
        if logits is not None:
            answers[variant.name] = logits
        _log(reports[variant.name])
    return reports, answers


def _add_costs(
    exports: Exports,
    reports: Mapping[str, bundle_pb2.ParityReport],
    rows: Rows,
    measure_cost: Measure,
) -> None:
    """Add to every report that passed what its variant costs; one at a time, to be undisturbed."""
    passed = [variant for variant in exports.variants if reports[variant.name].passed]
    log.info("measuring what %d variants cost, one at a time", len(passed))
    for variant in passed:
        try:
            found = measure_cost(variant, rows, session_options(variant.session))
        except ParityError as error:
            log.warning("%s; its report says nothing about it", error)
            continue
        found.add_to(reports[variant.name])


def _answer(run: Runner, images: Rows, hostile: Rows) -> tuple[float, Logits, Logits]:
    """Run the hostile inputs first, which warms up, then every row; seconds are of these."""
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


def _write(report: bundle_pb2.ParityReport, folder: Path) -> Path:
    path = folder / f"{report.variant}.json"
    path.write_text(json_format.MessageToJson(report, preserving_proto_field_name=True))
    return path


def _compared(outputs: Mapping[str, Rows]) -> Logits:
    """Return the output that is compared."""
    found: Rows = outputs[LOGITS if LOGITS in outputs else next(iter(outputs))]
    return found.astype(np.float32, copy=False)


def _timed(answer: Callable[[Rows], Mapping[str, Rows]]) -> Runner:
    def run(batches: list[Rows]) -> tuple[list[Logits], list[float]]:
        logits, seconds = [], []
        for batch in batches:
            started_s = time.monotonic()
            outputs = answer(batch)
            seconds.append(time.monotonic() - started_s)
            logits.append(_compared(outputs))
        return logits, seconds

    return run


def _saved_model(folder: Path) -> Runner:
    loaded = tf.saved_model.load(str(folder))

    (name,) = loaded.signatures["serving_default"].structured_input_signature[1]

    def answer(batch: Rows) -> dict[str, Rows]:
        serve = loaded.signatures["serving_default"]  # `loaded` owns the variables: keep it alive
        found = serve(**{name: tf.constant(batch)})
        return {output: value.numpy() for output, value in found.items()}

    return _timed(answer)


def _onnx(path: Path, options: bundle_pb2.SessionOptions) -> Runner:
    return _timed(Session(path.read_bytes(), options, threads=cores()).run)


def _tflite(path: Path) -> Runner:
    def run(batches: list[Rows]) -> tuple[list[Logits], list[float]]:
        outputs, seconds = runtimes.interpreted(path, batches)
        borders = np.cumsum([len(batch) for batch in batches])[:-1]
        return np.split(_compared(outputs), borders), seconds

    return run
