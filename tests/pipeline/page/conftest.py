"""Bundles with everything that a page can show, made without training anything."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from pipeline import measures
from pipeline.page import evidence
from pipeline.page.evidence import Evidence, FirstLayer
from protos import bundle_pb2
from service import agreement

ROWS = 400
HOSTILE = "<script>alert('label')</script><img src=x onerror=alert(1)>&amp;\"'`${7*7}{{7*7}}"
VARIANTS = {  # noise on each logit, as a share of what is allowed
    "saved-model": ("float32", 0.0),
    "tflite-float32": ("float32", 0.1),
    "onnx-float32": ("float32", 0.05),
    "onnx-float16": ("float16", 0.2),
    "tflite-int8": ("int8", 5.0),  # too much of it
    "onnx-int8": ("int8", 0.15),
}


@dataclass(frozen=True)
class Made:
    """A manifest and what was found beside it."""

    manifest: bundle_pb2.BundleManifest
    found: Evidence

    def write(self, models: Path) -> Path:
        """Write it as a published bundle, whose files are what the manifest says."""
        path = models / self.manifest.name / str(self.manifest.version)
        path.mkdir(parents=True)
        content = {
            "golden.npz": golden(self.manifest),
            "model.onnx": (models / "tiny.onnx").read_bytes(),
            "report.npz": self.found.packed(),
        }
        del self.manifest.files[:]
        for name, data in content.items():
            (path / name).write_bytes(data)
            self.manifest.files.add(
                path=name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data)
            )
        (path / "manifest.json").write_text(json_format.MessageToJson(self.manifest))
        return path


def golden(manifest):
    import io

    content = io.BytesIO()
    names = ("images", "logits") if manifest.labels else ("inputs", "outputs")
    arrays: dict[str, Any] = {
        one: np.zeros((1, 2)) for name in names for one in (name, f"hostile_{name}")
    }
    np.savez(content, **arrays, labels=np.zeros(1, np.int64))
    return content.getvalue()


def classifier(
    classes: int = 4,
    *,
    labels: list[str] | None = None,
    side: int = 28,
    channels: int = 1,
    name: str = "garments",
    version: int = 3,
    seed: int = 0,
) -> Made:
    """Make a classifier that is right most of the time, with all its variants."""
    random = np.random.default_rng(seed)
    labels = labels or [f"class {one}" for one in range(classes)]
    targets = np.arange(ROWS) % classes
    images = random.integers(0, 256, (ROWS, side, side, channels), np.uint8)
    logits = random.normal(size=(ROWS, classes)).astype(np.float32)
    logits[np.arange(ROWS), targets] += 2.5
    manifest = _manifest(name, version, bundle_pb2.KIND_CLASSIFIER, labels)
    _describe(manifest, seed)
    evaluation(manifest, logits, targets, labels)
    answers = _variants(manifest, logits, targets, labels, random)
    first = FirstLayer(
        "conv1",
        random.normal(size=(3, 3, channels, 16)).astype(np.float32),
        random.random((min(4, classes), 20, 20, 16), np.float32),
    )
    found = evidence.of_classifier(
        images,
        targets,
        logits,
        candidates=answers,
        mistakes=[one.row for one in manifest.evaluation.hardest],
        first=first,
    )
    return Made(manifest, found)


def numbers(name: str = "line") -> Made:
    """Make a model of two outputs that does not classify."""
    random = np.random.default_rng(1)
    targets = random.normal(size=(ROWS, 2)).astype(np.float32)
    outputs = targets + random.normal(scale=0.1, size=targets.shape).astype(np.float32)
    manifest = _manifest(name, 1, bundle_pb2.KIND_GENERIC, [])
    _describe(manifest, 1)
    for epoch in manifest.training.history:
        epoch.accuracy = epoch.validation_accuracy = 0
    manifest.evaluation.loss = measures.squared_error(outputs, targets)
    manifest.evaluation.accuracy.rows = ROWS
    answers = _variants(manifest, outputs, targets, [], random)
    return Made(manifest, evidence.of_numbers(targets, outputs, candidates=answers))


def evaluation(manifest, logits, targets, labels) -> None:
    found = manifest.evaluation
    predicted = logits.argmax(axis=1)
    matrix = measures.confusion_matrix(targets, predicted, len(labels))
    found.accuracy.CopyFrom(agreement.accuracy(predicted == targets))
    found.loss = measures.cross_entropy(logits, targets)
    found.calibration_error = measures.calibration_error(logits, targets)
    found.size_bytes, found.images_per_second = 2_400_000, 9_000
    for row in matrix:
        found.confusion.add(predicted=[int(one) for one in row])
    for one in measures.class_scores(matrix, labels):
        found.classes.add(
            label=one.label, precision=one.precision, recall=one.recall, rows=one.rows, f1=one.f1
        )
    for pair in measures.most_confused(matrix, labels):
        found.confused.add(label=pair.label, predicted=pair.predicted, rows=pair.rows)
    for mistake in measures.hardest(logits, targets, labels):
        found.hardest.add(
            row=mistake.row,
            label=mistake.label,
            predicted=mistake.predicted,
            probability=mistake.probability,
        )


def _manifest(name, version, kind, labels):
    return bundle_pb2.BundleManifest(
        format=1,
        name=name,
        version=version,
        kind=kind,
        labels=labels,
        input=bundle_pb2.TensorSpec(name="image", datatype="UINT8", shape=(-1, 28, 28, 1)),
        outputs=[bundle_pb2.TensorSpec(name="logits", datatype="FP32", shape=(-1, len(labels)))],
        served_variant="onnx-float32",
        dataset=bundle_pb2.Dataset(
            name="garments",
            sha256="ab" * 32,
            train_rows=48_000,
            validation_rows=12_000,
            test_rows=ROWS,
            split_seed=42,
            findings=["3 of 400 test rows are nearly a training row"],
        ),
    )


def _describe(manifest, seed) -> None:
    training, provenance = manifest.training, manifest.provenance
    training.preset, training.architecture, training.parameters = "quick", "small", 206_922
    training.seed, training.batch_rows, training.learning_rate = 42 + seed, 256, 0.003
    training.optimizer, training.device, training.best_epoch = "adam", "CPU", 9
    training.multiply_adds = 1_200_000
    training.config = json.dumps({"training": {"seed": 42 + seed, "schedule": "cosine"}})
    for number in range(1, 13):
        training.history.add(
            number=number, loss=1 / number, accuracy=1 - 0.3 / number, seconds=8,
            validation_loss=0.9 / number, validation_accuracy=1 - 0.28 / number,
        )  # fmt: skip
    provenance.run, provenance.created = "run-1", "2026-01-02T03:04:05Z"
    provenance.parent_sha256, provenance.git_commit = "cd" * 32, "ef" * 20
    provenance.tools["numpy"] = "2.4.6"
    provenance.dataset_license = "MIT"


def _variants(manifest, reference, targets, labels, random) -> dict[str, Any]:
    answers = {}
    for name, (precision, noise) in VARIANTS.items():
        allowed = agreement.budget(precision, reference)
        answer = reference + random.uniform(-1, 1, reference.shape).astype(np.float32) * (
            noise * allowed.max_logit
        )
        report = agreement.compare_by_kind(
            reference, answer, targets, allowed=allowed, class_names=labels
        )
        report.variant, report.size_bytes, report.images_per_second = name, 800_000, 20_000
        report.load_seconds, report.peak_rss_kib = 0.02, 60_000
        for rows in (1, 8, 64):
            report.latencies.add(rows=rows, p50_seconds=5e-5 * rows, p99_seconds=1e-4 * rows)
        manifest.parity.append(report)
        answers[name] = (answer, allowed.max_logit)
    broken = manifest.parity.add(variant="tflite-int16x8", failure="no such operator")
    broken.budget.CopyFrom(manifest.parity[-2].budget)
    manifest.served.CopyFrom(manifest.parity[2])
    manifest.served.variant = "served"
    return answers


@pytest.fixture
def make_classifier() -> Callable[..., Made]:
    return classifier


@pytest.fixture
def garments() -> Made:
    return classifier()


@pytest.fixture
def line() -> Made:
    return numbers()


@pytest.fixture
def hostile() -> Made:
    """Labels, names and settings that mean harm, or are merely long."""
    labels = [HOSTILE, "</style><style>*{display:none}", "W" * 300, "\x1b[31m\u202ered\n$x^2$"]
    made = classifier(labels=labels)
    made.manifest.dataset.name = made.manifest.training.architecture = HOSTILE
    made.manifest.dataset.findings.append(HOSTILE)
    made.manifest.training.config = json.dumps({HOSTILE: {HOSTILE: HOSTILE}, "a": None})
    made.manifest.parity[1].variant = HOSTILE[:60]
    made.manifest.parity[4].failure = HOSTILE
    made.manifest.provenance.git_commit = made.manifest.provenance.run = HOSTILE
    made.manifest.provenance.tools[HOSTILE] = HOSTILE
    return made


@pytest.fixture
def models(tmp_path, tiny) -> Path:
    """Give a folder of models, with the file that all bundles of these tests have."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "tiny.onnx").write_bytes(tiny.model())
    return folder
