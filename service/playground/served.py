"""Ask the server about one image, and find out where the time went.

A response says nothing about time. The server's statistics do, so they are read before and after:
the difference is this request's, or the mean of the few that came at the same time.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from service.aio_client import AsyncClient
from service.errors import ServerError
from service.messages import Answer
from service.playground.errors import PlaygroundError

ANSWER_S = 10.0
NS_PER_MS = 1e6
CHANNELS = (1, 3)
PIXELS = "UINT8"
COMPUTE = ("compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds."""

    total_ms: float  # as the page's own process saw it
    requests: int  # that the two below are the mean of; 0: not known
    queue_ms: float = 0.0
    compute_ms: float = 0.0  # in the model, with what is before and after it


async def metadata(client: AsyncClient, model: str, version: str) -> pb.ModelMetadataResponse:
    """Return what the server says about a model that takes pictures.

    Raises:
        PlaygroundError: it takes something else, or gives no classes.
        ServerError: the call was refused, or nobody answered.
    """
    about = await client.metadata(model, version, timeout_s=ANSWER_S)
    outputs = {one.name for one in about.outputs}
    if not takes_pictures(about):
        taken = about.inputs[0] if about.inputs else None
        shape = list(taken.shape[1:]) if taken else []
        raise PlaygroundError(
            f"the model {model} takes {taken.datatype if taken else 'nothing'} of shape {shape}, "
            "the page has pictures: UINT8 of one size with 1 or 3 channels"
        )
    if "probabilities" not in outputs:
        raise PlaygroundError(
            f"the model {model} answers {', '.join(sorted(outputs))}, the page shows "
            "probabilities of classes"
        )
    return about


def takes_pictures(about: pb.ModelMetadataResponse) -> bool:
    """Tell whether a model takes pictures of one size."""
    if len(about.inputs) != 1 or about.inputs[0].datatype != PIXELS:
        return False
    shape = about.inputs[0].shape[1:]
    return len(shape) == 3 and min(shape) > 0 and shape[2] in CHANNELS  # noqa: PLR2004  h, w, c


async def ask(
    client: AsyncClient, pixels: NDArray[np.uint8], *, model: str, version: str
) -> tuple[Answer, Latency]:
    """Ask a model about one image.

    Args:
        client: of the server.
        pixels: (height, width, channels) as the model takes them.
        model: its name.
        version: decimal, or an alias; empty: the server's choice.

    Raises:
        ServerError: the call was refused, or nobody answered.
    """
    before = await _statistics(client, model)
    started_s = time.monotonic()
    answer = await client.predict(
        pixels[np.newaxis], model=model, version=version, timeout_s=ANSWER_S
    )
    total_ms = (time.monotonic() - started_s) * 1000
    after = await _statistics(client, model)
    return answer, _latency(total_ms, before.get(answer.version), after.get(answer.version))


async def _statistics(client: AsyncClient, model: str) -> dict[str, pb.InferStatistics]:
    """Return what was timed, by version; nothing where a server does not tell."""
    try:
        found = await client.statistics(model, timeout_s=ANSWER_S)
    except ServerError as error:
        if error.code in {"NOT_FOUND", "UNIMPLEMENTED", "PERMISSION_DENIED"}:
            return {}
        raise
    return {one.version: one.inference_stats for one in found}


def _latency(
    total_ms: float, before: pb.InferStatistics | None, after: pb.InferStatistics | None
) -> Latency:
    if after is None:
        return Latency(total_ms, 0)
    before = before or pb.InferStatistics()
    count = after.success.count - before.success.count
    if count < 1:  # another replica counted it
        return Latency(total_ms, 0)

    def mean_ms(*names: str) -> float:
        later, earlier = ([getattr(one, name).ns for name in names] for one in (after, before))
        return float(max(0, sum(later) - sum(earlier)) / count / NS_PER_MS)

    queue_ms, compute_ms = mean_ms("queue"), mean_ms(*COMPUTE)
    return Latency(total_ms, count, queue_ms, compute_ms)
