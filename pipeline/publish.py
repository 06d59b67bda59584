"""Write a bundle in a hidden folder, and rename it into place when it is whole and proven.

Readers of `models/` see a version whole or not at all, whatever moment the process dies at. What
a dead run left hidden is removed by the next.
"""

import errno
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from pathlib import Path, PurePosixPath

import keras
import numpy as np
from google.protobuf import json_format, timestamp_pb2

from pipeline import dataset, files, messages, page, parity
from pipeline.config import Config, PublishConfig, as_tables
from pipeline.errors import BusyError, PublishError
from pipeline.page import evidence, first_layer
from pipeline.records import Checked, Dataset, Exports, Published, Scores, Staged, Trained
from protos import bundle_pb2
from service import agreement, bundle
from service.errors import BundleError
from service.session import Session, Tensor

log = logging.getLogger(__name__)
STAGING_PREFIX = ".staging-"
LOCK = ".lock"
LAST = ".last-version"  # what was published last stays taken when it is removed
TRITON_CONFIG = "config.pbtxt"
VARIANTS = "variants"
GOLDEN_ROWS_PER_CLASS = 20  # 200 images are answered in milliseconds at every load
GOLDEN_ROWS = 200  # where there are no classes
TOOLS = (
    "train-export",
    "tensorflow",
    "keras",
    "tf2onnx",
    "onnx",
    "onnxruntime",
    "ai-edge-litert",
    "numpy",
)


@contextmanager
def _writing(place: Path, advice: str = "") -> Iterator[None]:
    """Turn what the system refuses inside the block into one sentence about a folder.

    Raises:
        PublishError: it cannot be written to.
    """
    try:
        yield
    except OSError as error:
        raise PublishError(f"{place} cannot be written to: {_reason(error)}{advice}") from error


def _reason(error: OSError) -> str:
    if isinstance(error, shutil.Error):  # of a copied folder: (from, to, why) for each file
        return str(error.args[0][0][2] if isinstance(error.args[0], list) else error)
    room = ", the disk is full" if error.errno == errno.ENOSPC else ""
    return f"{error.strerror or error}{room}"


@contextmanager
def staging(config: PublishConfig) -> Iterator[Path]:
    """Give a hidden folder beside the models, and remove it at the end, whatever happened.

    Raises:
        PublishError: the models' folder cannot be written to.
    """
    with ExitStack() as held:
        with _writing(config.models, "; name another with --models"):
            config.models.mkdir(parents=True, exist_ok=True)
            # One at a time: a folder that is made but not locked yet looks abandoned.
            with files.locked(config.models / LOCK, wait=True):
                _remove_abandoned(config.models)
                folder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=config.models))
                held.callback(shutil.rmtree, folder, ignore_errors=True)
                held.enter_context(files.locked(folder / LOCK, wait=False))
        yield folder


def stage(  # noqa: PLR0913  a bundle is made of everything the run knows
    folder: Path,
    run: str,
    config: Config,
    data: Dataset,
    trained: Trained,
    scores: Scores,
    exports: Exports,
    checked: Checked,
) -> Staged:
    """Write a bundle, whole but for the served parity and the page, as the next version.

    Args:
        folder: of `staging`.
        run: names this run in the manifest.
        config: of this run.
        data: what the model learnt from.
        trained: the original.
        scores: of the original.
        exports: those that passed go into the bundle.
        checked: parity of every variant.

    Raises:
        PublishError: `folder` cannot be written to.
    """
    name = config.publishing.name
    number = _next_version(config.publishing.models / name)
    path = folder / name / str(number)
    served = exports.named(checked.served_variant)
    with _writing(folder.parent):
        reports = _copy_passed(exports, checked, path)
        shutil.copy2(served.path, path / bundle.MODEL)
        _write_golden(path / bundle.GOLDEN, data, checked)
        with _dispensable(evidence.FILE):
            found = _evidence(data, trained, scores, checked, reports)
            (path / evidence.FILE).write_bytes(found.packed())
    manifest = _manifest(run, config, data, trained, scores, checked)
    manifest.session.CopyFrom(parity.session_options(served.session))
    _add_tensors(manifest, path / bundle.MODEL)
    manifest.name, manifest.version = name, number
    manifest.parity.extend(reports)
    manifest.files.extend(_listed(path))
    with _writing(folder.parent):
        write_manifest(path, manifest)
    return Staged(repository=folder, path=path)


def publish(staged: Staged, served: Path, config: PublishConfig) -> Published:
    """Add the served parity and the page, and rename the bundle into place.

    Args:
        staged: what was served.
        served: its parity, a ParityReport as JSON.
        config: where it goes.

    Raises:
        PublishError: the served parity did not pass, or the folder cannot be written to.
    """
    manifest = bundle.read_manifest(staged.path)
    manifest.served.CopyFrom(parity.read_report(served))
    if not manifest.served.passed:
        raise PublishError(f"the served model is not to be published: {manifest.served.failure}")
    home = config.models / config.name
    with _writing(home), files.locked(home / LOCK, wait=True):
        number = _next_version(home)  # another run may have published meanwhile
        manifest.version = number
        _add_page(staged.path, manifest)
        write_manifest(staged.path, manifest)
        files.sync_tree(staged.path)
        files.write_whole(home / LAST, str(number).encode())
        _write_triton_config(home, manifest)
        staged.path.rename(home / str(number))  # last: what fails before it publishes nothing
        files.sync(home)
    log.info("published %s", home / str(number))
    return Published(path=home / str(number), name=config.name, version=number)


def _write_triton_config(home: Path, manifest: bundle_pb2.BundleManifest) -> None:
    """Keep the model's config.pbtxt up to date, unless somebody has written or edited it."""
    path, text = home / TRITON_CONFIG, triton_config(manifest)
    if path.exists() and path.read_bytes() not in (text.encode(), _published_config(home)):
        log.info("%s was edited, and is kept", path)
        return
    files.write_whole(path, text.encode())


def _published_config(home: Path) -> bytes | None:
    """Return what the newest version's config.pbtxt was written as; None: there is none."""
    versions = [int(one.name) for one in home.iterdir() if bundle.VERSION.fullmatch(one.name)]
    if not versions:
        return None
    try:
        return triton_config(bundle.read_manifest(home / str(max(versions)))).encode()
    except BundleError:
        return None


def write_manifest(path: Path, manifest: bundle_pb2.BundleManifest) -> None:
    """Write a bundle's manifest, at once and whole."""
    text = json_format.MessageToJson(manifest, preserving_proto_field_name=True, indent=1)
    files.write_whole(path / bundle.MANIFEST, f"{text}\n".encode())


def _remove_abandoned(models: Path) -> None:
    """Remove what runs that died have staged: nobody holds its lock any more."""
    for folder in models.glob(f"{STAGING_PREFIX}*"):
        try:
            with files.locked(folder / LOCK, wait=False):
                log.info("removing %s, left by a run that died", folder)
                shutil.rmtree(folder, ignore_errors=True)
        except BusyError:
            continue


def _next_version(home: Path) -> int:
    names = [path.name for path in home.iterdir()] if home.is_dir() else []
    if LAST in names:
        names.append((home / LAST).read_text().strip())
    return max((int(name) for name in names if bundle.VERSION.fullmatch(name)), default=0) + 1


def _copy_passed(exports: Exports, checked: Checked, path: Path) -> list[bundle_pb2.ParityReport]:
    """Copy what passed into the bundle; return every report, with the place of those."""
    folder = path / VARIANTS
    folder.mkdir(parents=True)
    shutil.copy2(exports.calibration, folder)
    reports = [parity.read_report(report) for report in checked.reports]
    for report in reports:
        if report.passed:
            file = exports.named(report.variant).path
            copy = shutil.copytree if file.is_dir() else shutil.copy2
            copy(file, folder / file.name)
            report.path = f"{VARIANTS}/{file.name}"
    return reports


def _write_golden(path: Path, data: Dataset, checked: Checked) -> None:
    """Keep the first test rows, of every class, and the hostile ones, with the reference."""
    test = dataset.load(data).test
    classes = [
        np.flatnonzero(test.targets == label)[:GOLDEN_ROWS_PER_CLASS]
        for label in range(len(data.labels))
    ]
    rows = np.concatenate(classes) if classes else np.arange(len(test.inputs))[:GOLDEN_ROWS]
    labels = {"labels": test.targets[rows].astype(np.int64)} if classes else {}
    inputs, outputs = ("images", "logits") if classes else ("inputs", "outputs")
    with np.load(checked.answers, allow_pickle=False) as answers:
        arrays = {
            inputs: test.inputs[rows],
            outputs: answers["reference"][rows],
            f"hostile_{inputs}": answers["hostile_inputs"],
            f"hostile_{outputs}": answers["hostile_reference"],
        }
    np.savez_compressed(path, allow_pickle=False, **arrays, **labels)


def _evidence(
    data: Dataset,
    trained: Trained,
    scores: Scores,
    checked: Checked,
    reports: list[bundle_pb2.ParityReport],
) -> evidence.Evidence:
    """Gather what the page shows besides the manifest, while all answers are there."""
    test = dataset.load(data).test
    with np.load(checked.answers, allow_pickle=False) as answers:
        candidates = {
            one.variant: (answers[one.variant], one.budget.max_logit)
            for one in reports
            if one.variant in answers.files
        }
        reference = answers["reference"]
    if not data.classifies:
        return evidence.of_numbers(test.targets, reference, candidates=candidates)
    original = keras.models.load_model(trained.path, compile=False)
    return evidence.of_classifier(
        test.inputs,
        test.targets,
        reference,
        candidates=candidates,
        mistakes=[one.row for one in scores.hardest],
        first=first_layer.find(original, test.inputs[evidence.example_rows(test.targets)]),
    )


@contextmanager
def _dispensable(file: str) -> Iterator[None]:
    """Go on without a file that only shows what is proven: no reason to lose a training."""
    try:
        yield
    except OSError:  # of a disk, on which nothing else could be published either
        raise
    except Exception:
        log.exception("%s cannot be made; the bundle is published without", file)


def _add_page(path: Path, manifest: bundle_pb2.BundleManifest) -> None:
    """Write the page into the bundle, and list it, once."""
    with _dispensable(page.FILE):
        written = _file(path, page.write(path, manifest))
        listed = [one for one in manifest.files if one.path != page.FILE]  # of a try before
        del manifest.files[:]
        manifest.files.extend(sorted([*listed, written], key=lambda one: PurePosixPath(one.path)))


def _listed(path: Path) -> list[bundle_pb2.File]:
    return [_file(path, file) for file in sorted(path.rglob("*")) if file.is_file()]


def _file(path: Path, file: Path) -> bundle_pb2.File:
    return bundle_pb2.File(
        path=file.relative_to(path).as_posix(),
        sha256=bundle.file_sha256(file),
        size_bytes=file.stat().st_size,
    )


def _manifest(
    run: str,
    config: Config,
    data: Dataset,
    trained: Trained,
    scores: Scores,
    checked: Checked,
) -> bundle_pb2.BundleManifest:
    kind = bundle_pb2.KIND_CLASSIFIER if data.classifies else bundle_pb2.KIND_GENERIC
    training = messages.training(trained)
    training.MergeFrom(messages.settings(as_tables(config)))
    return bundle_pb2.BundleManifest(
        format=bundle.FORMAT,
        kind=kind,
        labels=data.labels,
        served_variant=checked.served_variant,
        dataset=messages.dataset(data),
        training=training,
        evaluation=messages.evaluation(trained, scores, config.gate),
        test_distribution=_distribution(data, checked) if data.classifies else None,
        provenance=bundle_pb2.Provenance(
            run=run,
            created=_now(),
            git_commit=git_commit(Path(__file__).parent),
            parent_sha256=trained.sha256,
            tools={tool: package_version(tool) for tool in TOOLS},
            dataset_license=data.license,
        ),
    )


def _add_tensors(manifest: bundle_pb2.BundleManifest, model: Path) -> None:
    """Promise the tensors that the server will find: names, datatypes and shapes."""
    session = Session(model.read_bytes(), manifest.session, threads=1)
    manifest.input.CopyFrom(_spec(session.inputs[0]))
    manifest.outputs.extend(_spec(one) for one in session.outputs)


def _spec(tensor: Tensor) -> bundle_pb2.TensorSpec:
    return bundle_pb2.TensorSpec(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def _distribution(data: Dataset, checked: Checked) -> bundle_pb2.TestDistribution:
    images = dataset.load(data).test.inputs
    with np.load(checked.answers, allow_pickle=False) as answers:
        return agreement.distribution(answers["reference"], images)


def _now() -> str:
    now = timestamp_pb2.Timestamp()
    now.FromDatetime(datetime.now(UTC).replace(microsecond=0))
    return now.ToJsonString()


def git_commit(folder: Path) -> str:
    """Return the commit a folder is at, with a + if files differ; empty outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603  fixed words
            ("git", *words),
            cwd=folder,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def triton_config(manifest: bundle_pb2.BundleManifest) -> str:
    """Return the model's configuration for Triton, which can serve the same folder."""
    outputs = ",\n".join(_triton_tensor(spec) for spec in manifest.outputs)
    return (
        f'name: "{manifest.name}"\nbackend: "onnxruntime"\nmax_batch_size: 256\n'
        f"input [\n{_triton_tensor(manifest.input)}\n]\noutput [\n{outputs}\n]\n"
        "dynamic_batching {}\n"
    )


def _triton_tensor(spec: bundle_pb2.TensorSpec) -> str:
    dims = ", ".join(map(str, spec.shape[1:]))
    return f'  {{ name: "{spec.name}", data_type: TYPE_{spec.datatype}, dims: [ {dims} ] }}'
