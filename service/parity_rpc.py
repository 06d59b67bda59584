"""What this server says about the parity of what it serves."""

import json

from protos import parity_pb2
from service import bundle
from service.errors import InvalidRequestError
from service.repository import Repository, Served


def get_parity(
    repository: Repository, request: parity_pb2.GetParityRequest
) -> parity_pb2.GetParityResponse:
    """Answer ParityService.GetParity.

    Raises:
        InvalidRequestError: a version without a model, or one that is not a number.
        ModelNotFoundError: the named model or version is not in the repository.
        ModelNotReadyError: it is, but may not be served.
    """
    if request.version and not request.model:
        raise InvalidRequestError(
            f"version is '{request.version}' without a model; name the model as well"
        )
    if request.version:
        found = [repository.get(request.model, request.version)]
    elif request.model:
        highest = repository.get(request.model, "")
        found = [other for other in repository.versions() if other.name == highest.name]
    else:
        found = repository.versions()
    return parity_pb2.GetParityResponse(versions=[_parity(served) for served in found])


def properties(served: Served) -> dict[str, str]:
    """Return what ModelMetadata says beyond the tensors, by dotted names."""
    manifest, check = served.manifest, served.self_check.report
    model = next(file for file in manifest.files if file.path == bundle.MODEL)
    report = next(report for report in manifest.parity if report.variant == manifest.served_variant)
    return {
        "labels": json.dumps(list(manifest.labels)),
        "max_batch_rows": str(served.options.max_batch_rows),
        "model.sha256": model.sha256,
        "dataset.name": manifest.dataset.name,
        "dataset.sha256": manifest.dataset.sha256,
        "parent.sha256": manifest.provenance.parent_sha256,
        "run": manifest.provenance.run,
        "parity.variant": report.variant,
        "parity.rows": str(report.accuracy.rows),
        "parity.accuracy": f"{report.accuracy.value:.6g}",
        "parity.reference_accuracy": f"{report.reference_accuracy.value:.6g}",
        "parity.agreement": f"{report.agreement:.6g}",
        "parity.max_logit_difference": f"{report.logits.max:.6g}",
        "parity.max_logit_budget": f"{report.budget.max_logit:.6g}",
        "parity.self_check.max_logit_difference": f"{check.logits.max:.6g}",
        "parity.self_check.checked": served.self_check.checked,
    }


def _parity(served: Served) -> parity_pb2.VersionParity:
    return parity_pb2.VersionParity(
        model=served.name,
        version=str(served.number),
        variants=served.manifest.parity,
        served=served.manifest.served if served.manifest.HasField("served") else None,
        self_check=served.self_check,
    )
