"""Load one version of a model and hold it against its proof, on this host.

Files against the manifest, tensors against the manifest, every batch rung once, the golden set
within the published budget: whatever fails is a refusal with its reason.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import timestamp_pb2
from numpy.typing import NDArray

from protos import bundle_pb2, parity_pb2
from service import agreement, bundle, host
from service.bundle import LOGITS, checked_output
from service.errors import BundleError
from service.model_config import ModelOptions
from service.session import CUDA, RUNTIME, Session
from service.tensors import DTYPE

PROBABILITIES = "probabilities"  # the one that its clients read
REAL = "biuf"  # numpy's kinds of dtypes whose values are numbers on a line


@dataclass(frozen=True, slots=True)
class Version:
    """A version that passed every check."""

    manifest: bundle_pb2.BundleManifest
    options: ModelOptions
    session: Session
    warmed: Mapping[int, float]  # seconds of one call, by batch rung
    self_check: parity_pb2.SelfCheck


def load(path: Path, options: ModelOptions) -> Version:
    """Read, verify, load, warm and check one bundle; blocks.

    Raises:
        ServiceError: one of these failed; the bundle must not be served.
    """
    started_s = time.monotonic()
    content = bundle.read(path)
    session = Session(
        content.model,
        content.manifest.session,
        threads=options.threads,
        providers=options.providers,
    )
    _check_schema(content, session)
    _check_metadata(content, session.metadata)
    _check_golden(content)
    warmed = session.warm_up(options.max_batch_rows, content.golden.inputs[0])
    report = _answer_golden(content, session, options.max_batch_rows)
    if not report.passed:
        raise BundleError(
            f"{bundle.shown(path)} fails its self-check on this host: {report.failure}"
        )
    processor = host.processor()
    checked = timestamp_pb2.Timestamp()
    checked.FromDatetime(datetime.now(UTC).replace(microsecond=0))
    return Version(
        content.manifest,
        options,
        session,
        warmed,
        parity_pb2.SelfCheck(
            report=report,
            checked=checked.ToJsonString(),
            seconds=time.monotonic() - started_s,
            cpu=processor.name,
            threads=options.threads,
            providers=session.providers,
            cpu_flags=processor.kernel_flags,
            gpus=host.gpus() if CUDA in session.providers else (),
            session=content.manifest.session,
        ),
    )


def _check_schema(content: bundle.Bundle, session: Session) -> None:
    """Refuse a model whose tensors are not those of its manifest."""
    manifest = content.manifest
    promised = [(spec.name, spec.datatype, tuple(spec.shape)) for spec in manifest.outputs]
    found = [(tensor.name, tensor.datatype, tensor.shape) for tensor in session.outputs]
    spec = manifest.input
    promised.append((spec.name, spec.datatype, tuple(spec.shape)))
    found += [(tensor.name, tensor.datatype, tensor.shape) for tensor in session.inputs]
    if sorted(promised) != sorted(found):
        raise BundleError(
            f"{bundle.shown(content.path, bundle.MODEL)} has the tensors {sorted(found)}, "
            f"its manifest promises {sorted(promised)}"
        )
    outputs = {output.name for output in manifest.outputs}
    if not outputs or checked_output(manifest) not in outputs:
        raise BundleError(f"{bundle.shown(content.path)} has no output {LOGITS!r} to be checked by")
    if not spec.shape or spec.shape[0] != -1 or 0 in spec.shape:
        raise BundleError(
            f"{bundle.shown(content.path)} takes the shape {list(spec.shape)}, "
            "expected -1 for the batch first, and no size of 0"
        )


def _check_metadata(content: bundle.Bundle, said: Mapping[str, str]) -> None:
    """Refuse a model that says it is another, or names its classes otherwise: logits show neither.

    What a model does not say is not asked: only our exports say it.
    """
    manifest = content.manifest
    model = bundle.shown(content.path, bundle.MODEL)
    parent = manifest.provenance.parent_sha256
    if parent and said.get("parent.sha256", parent) != parent:
        raise BundleError(
            f"{model} comes from the original {said['parent.sha256'][:12]}, its manifest is of "
            f"{parent[:12]}; publish it again"
        )
    labels = list(manifest.labels)
    try:
        found = json.loads(said.get("labels", "null"))
    except ValueError:
        found = said["labels"]
    if labels and found not in (None, labels):
        raise BundleError(
            f"{model} has the labels {str(found)[:200]}, its manifest {str(labels)[:200]}; "
            "publish it again"
        )


def _check_golden(content: bundle.Bundle) -> None:
    """Refuse a golden set that is not made of the model's own inputs, and of numbers."""
    spec = content.manifest.input
    for inputs in (content.golden.inputs, content.golden.hostile_inputs):
        fits = inputs.ndim == len(spec.shape) and all(
            wanted in {size, -1} for size, wanted in zip(inputs.shape, spec.shape, strict=True)
        )
        if not (fits and inputs.size and inputs.dtype == DTYPE.get(spec.datatype)):
            raise BundleError(
                f"{bundle.shown(content.path)} has an unusable golden set: inputs of shape "
                f"{list(inputs.shape)} and dtype {inputs.dtype}, the model takes "
                f"{list(spec.shape)} of {spec.datatype}"
            )
    for outputs in (content.golden.outputs, content.golden.hostile_outputs):
        if outputs.dtype.kind not in REAL:
            raise BundleError(
                f"{bundle.shown(content.path)} has an unusable golden set: "
                f"outputs of dtype {outputs.dtype}, expected numbers"
            )


def _answer_golden(
    content: bundle.Bundle, session: Session, max_batch_rows: int
) -> bundle_pb2.ParityReport:
    """Hold the loaded model against the golden set, to the budget it was published with."""
    golden, manifest = content.golden, content.manifest
    allowed = _budget(content)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused, not warned about
            outputs = _outputs(session, golden.inputs, max_batch_rows)
            answers = outputs[checked_output(manifest)]
            if manifest.kind == bundle_pb2.KIND_GENERIC:
                report = agreement.compare_outputs(golden.outputs, answers, allowed=allowed)
            else:
                report = agreement.compare(
                    golden.outputs.astype(np.float32, copy=False),
                    answers.astype(np.float32, copy=False),
                    golden.labels,
                    allowed=allowed,
                    class_names=list(manifest.labels),
                )
            extremes = _outputs(session, golden.hostile_inputs, max_batch_rows)
            agreement.add_hostile(
                report, golden.hostile_outputs, extremes[checked_output(manifest)]
            )
    except ValueError as error:
        raise BundleError(
            f"{bundle.shown(content.path)} has an unusable golden set: {error}"
        ) from error
    if manifest.kind != bundle_pb2.KIND_GENERIC and PROBABILITIES in outputs:
        agreement.judge_probabilities(report, answers, outputs[PROBABILITIES])
    report.variant, report.runtime, report.path = "self-check", RUNTIME, bundle.MODEL
    report.size_bytes = len(content.model)
    return report


def _budget(content: bundle.Bundle) -> agreement.Budget:
    manifest = content.manifest
    published = next(
        (report for report in manifest.parity if report.variant == manifest.served_variant),
        None,
    )
    if (
        published is None
        or published.budget.precision not in agreement.COEFFICIENT
        or not math.isfinite(published.budget.scale)  # nothing would be beyond it
    ):
        raise BundleError(
            f"{bundle.shown(content.path)} has no usable parity report of its served variant "
            f"{manifest.served_variant!r}; publish it again"
        )
    return agreement.Budget(published.budget.precision, published.budget.scale)


def _outputs(
    session: Session, inputs: NDArray[np.generic], max_batch_rows: int
) -> dict[str, NDArray[Any]]:
    """Return every output by its name, (rows, ...)."""
    parts = [
        session.run(inputs[start : start + max_batch_rows])
        for start in range(0, len(inputs), max_batch_rows)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
