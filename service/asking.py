"""What both clients do: which requests are made, in which order, and which of them again.

Not how their answers are waited for: `service.client` gives it a wire that blocks, and
`service.aio_client` one that awaits. It speaks Triton's dialect, and so works with any server that
does; only parity and sampled rows need ours.
"""

import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import NDArray

from protos import inference_pb2 as pb
from protos import model_config_pb2, parity_pb2
from service import messages
from service.connection import Connection, content
from service.errors import ServerError
from service.messages import Answer, Reply
from service.tensors import DTYPE

Response = TypeVar("Response", bound=Message)
Result = TypeVar("Result")
Left = Callable[[], float]  # seconds that the next request may take

PARTS_IN_FLIGHT = 4  # of one call: enough to hide the way there and back, few enough to be fair
METADATA_S = 60.0  # how long it is believed; a server may be replaced by another
POLL_S = 5.0  # longest wait for one answer while waiting for a server to become ready
NOT_READY = "is not at ready state"  # Triton's phrase for a version that is loading, or has left
PAUSE_S = 0.5  # of a call that waits, after gRPC's own tries found no server available
SHUT_OUT = ("UNAUTHENTICATED", "PERMISSION_DENIED")


class Sent(Protocol):
    """A request on its way."""

    def cancel(self) -> None:
        """Stop waiting for it."""

    async def response(self) -> pb.ModelInferResponse:
        """Wait for what it is answered, or raise ServerError."""


class Wire(Protocol):
    """What carries requests: one blocks, one awaits. What is refused raises ServerError."""

    async def call(self, request: Message, response: type[Response], timeout_s: float) -> Response:
        """Make the call that the request's type is named after."""

    def start(self, request: pb.ModelInferRequest, timeout_s: float) -> Sent:
        """Send a request without waiting."""

    def stream(
        self, method: str, request: Message, response: type[Response]
    ) -> AsyncGenerator[Response, None]:
        """Make a call that is answered again and again, until it is closed."""

    async def join(
        self, request: pb.ModelInferRequest, max_rows: int, timeout_s: float
    ) -> Reply | None:
        """Send a request with others like it; None: it must be sent alone."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""

    async def aside(self, work: Callable[[], Result]) -> Result:
        """Do what may take its time, such as reading files."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of whom."""

    model: str
    version: str  # decimal, or an alias; empty: the server's choice
    rows: int
    requests: Callable[[pb.ModelMetadataResponse], Iterator[pb.ModelInferRequest]]


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Rows that one version was asked about, and what it answered; read-only."""

    model: str
    version: str  # decimal
    parent_sha256: str  # of the version's original, as its manifest says
    inputs: NDArray[np.generic]  # (rows, ...), of the model's dtype and shape
    outputs: NDArray[np.float32]  # (rows, ...): a classifier's logits, else what parity is of
    dropped: int  # rows of this version dropped before these, since the call began


class Asker:
    """What both clients do.

    Every method raises ServerError when the server refuses the call or none answers in time, and
    ValueError for what is not sent at all. Its `timeout_s` is the longest wait for all that it
    sends; None: each request may take as long as the client allows.
    """

    def __init__(self, connection: Connection, wire: Wire) -> None:
        self._connection = connection
        self._wire = wire
        self._known: dict[tuple[str, str], tuple[float, pb.ModelMetadataResponse]] = {}

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the server says that it is ready.

        Raises:
            ServerError: it did not within `timeout_s` seconds, and says what it last answered; at
                once if it does not let this client in.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            left_s = min(self._connection.timeout_s, max(until_s - time.monotonic(), POLL_S))
            try:
                ready = await self._call(pb.ServerReadyRequest(), pb.ServerReadyResponse, left_s)
                if ready.ready:
                    return
                last = "it answers that it is not ready"
            except ServerError as error:
                if error.code in SHUT_OUT:
                    raise
                last = str(error)
            if time.monotonic() > until_s:
                raise ServerError(
                    f"{self._connection.address} is not ready after {timeout_s:g} s: {last}",
                    code="UNAVAILABLE",
                )
            await self._wire.sleep(0.05)

    async def models(
        self, *, timeout_s: float | None = None
    ) -> list[pb.RepositoryIndexResponse.ModelIndex]:
        """Return every model and version that the server found, with its state."""
        request = pb.RepositoryIndexRequest()
        return list((await self._call(request, pb.RepositoryIndexResponse, timeout_s)).models)

    async def metadata(
        self, model: str, version: str = "", *, timeout_s: float | None = None
    ) -> pb.ModelMetadataResponse:
        """Return a model's tensors, versions and properties."""
        request = pb.ModelMetadataRequest(name=model, version=version)
        return await self._call(request, pb.ModelMetadataResponse, timeout_s)

    async def config(
        self, model: str, version: str = "", *, timeout_s: float | None = None
    ) -> model_config_pb2.ModelConfig:
        """Return how a model is served."""
        request = pb.ModelConfigRequest(name=model, version=version)
        return (await self._call(request, pb.ModelConfigResponse, timeout_s)).config

    async def statistics(
        self, model: str = "", version: str = "", *, timeout_s: float | None = None
    ) -> list[pb.ModelStatistics]:
        """Return what the server has counted and timed; of everything if none is named."""
        request = pb.ModelStatisticsRequest(name=model, version=version)
        return list((await self._call(request, pb.ModelStatisticsResponse, timeout_s)).model_stats)

    async def parity(
        self, model: str = "", version: str = "", *, timeout_s: float | None = None
    ) -> parity_pb2.GetParityResponse:
        """Return what the server says about its own parity; of everything if none is named."""
        request = parity_pb2.GetParityRequest(model=model, version=version)
        return await self._call(request, parity_pb2.GetParityResponse, timeout_s)

    async def watch_parity(
        self, model: str = "", version: str = ""
    ) -> AsyncGenerator[parity_pb2.GetParityResponse, None]:
        """Give what `parity` returns, and again whenever it has changed; has no deadline.

        To close the generator ends the call.
        """
        request = parity_pb2.GetParityRequest(model=model, version=version)
        answers = self._wire.stream("StreamParity", request, parity_pb2.GetParityResponse)
        async with aclosing(answers):
            async for answer in answers:
                yield answer

    async def sample(self, model: str = "") -> AsyncGenerator[SampledRows, None]:
        """Give rows that the server answers from now on, at its own rate; has no deadline.

        To close the generator ends the call. Rows of a version that has left before they could
        be read are passed over.

        Args:
            model: whose; empty: every model's.
        """
        request = parity_pb2.SampleTrafficRequest(model=model)
        answers = self._wire.stream("SampleTraffic", request, parity_pb2.SampledRows)
        async with aclosing(answers):
            async for rows in answers:
                decoded = await self._decoded(rows)
                if decoded is not None:
                    yield decoded

    async def report(
        self,
        figures: parity_pb2.ShadowFigures,
        *,
        model: str,
        version: str,
        parent_sha256: str,
        timeout_s: float | None = None,
    ) -> None:
        """Tell the server what became of sampled rows, each of them once.

        Args:
            figures: as `agreement.figures` counts them.
            model: whose rows they are.
            version: decimal.
            parent_sha256: of the original that they were held against.
            timeout_s: longest wait; None: the client's.
        """
        request = parity_pb2.ReportShadowRequest(
            model=model, version=version, parent_sha256=parent_sha256, figures=figures
        )
        await self._call(request, parity_pb2.ReportShadowResponse, timeout_s)

    async def load(self, model: str, *, timeout_s: float | None = None) -> None:
        """Have a model loaded, or loaded again, and wait until it is ready; sent only once."""
        request = pb.RepositoryModelLoadRequest(model_name=model)
        await self._call(request, pb.RepositoryModelLoadResponse, timeout_s)
        self._forget(model)

    async def unload(self, model: str, *, timeout_s: float | None = None) -> None:
        """Have a model unloaded; sent only once."""
        request = pb.RepositoryModelUnloadRequest(model_name=model)
        await self._call(request, pb.RepositoryModelUnloadResponse, timeout_s)
        self._forget(model)

    async def predict(
        self,
        images: NDArray[np.generic],
        *,
        model: str,
        version: str = "",
        timeout_s: float | None = None,
    ) -> Answer:
        """Ask a model about some images, in as many requests as the limits of both sides need.

        Args:
            images: of the model's dtype and shape, (rows, height, width, channels) for images;
                at least one row.
            model: its name.
            version: decimal, or an alias; empty: the server's choice. The version that answers
                the first request answers all of them.
            timeout_s: longest wait for them together; None: the client's, for each.

        Raises:
            ValueError: there are no rows, or their dtype is not the model's.
            ServerError: the call was refused, or nobody answered.
        """
        array = np.asarray(images)
        if not array.shape or not len(array):
            raise ValueError("images has no rows, expected at least one")
        limit = self._connection.max_message_bytes
        requests = partial(messages.tensor_requests, array, limit)
        question = Question(model, version, len(array), requests)
        return await self._answer(question, self._left(timeout_s))

    async def predict_pictures(
        self,
        pictures: Sequence[bytes | str | Path],
        *,
        model: str,
        version: str = "",
        timeout_s: float | None = None,
    ) -> Answer:
        """Ask a model about PNG or JPEG files of any size, which the server decodes.

        Args:
            pictures: their contents, or their paths; at least one.
            model: its name.
            version: as in `predict`.
            timeout_s: as in `predict`.

        Raises:
            ValueError: there are none, or one cannot be read.
            ServerError: the call was refused, or nobody answered.
        """
        if isinstance(pictures, bytes | str | Path) or not pictures:
            raise ValueError("pictures is not a list of PNG or JPEG files, expected at least one")
        contents = await self._wire.aside(partial(_contents, pictures))
        requests = partial(messages.picture_requests, contents)
        question = Question(model, version, len(contents), requests)
        return await self._answer(question, self._left(timeout_s))

    def _left(self, timeout_s: float | None) -> Left:
        if timeout_s is None:
            return lambda: self._connection.timeout_s
        until_s = time.monotonic() + timeout_s
        return lambda: max(0.0, until_s - time.monotonic())

    async def _call(
        self, request: Message, response: type[Response], timeout_s: float | None
    ) -> Response:
        return await self._sent(request, response, self._left(timeout_s)())

    async def _sent(self, request: Message, response: type[Response], timeout_s: float) -> Response:
        """Make a call; of a client that waits, again for as long as no server is available."""
        until_s = time.monotonic() + timeout_s
        while True:
            left_s = max(0.0, until_s - time.monotonic())
            try:
                return await self._wire.call(request, response, left_s)
            except ServerError as error:
                if not self._waits(request, error) or left_s <= PAUSE_S:
                    raise
            await self._wire.sleep(PAUSE_S)

    def _waits(self, request: Message, error: ServerError) -> bool:
        """Say whether no server is available for now, and this client waits for one."""
        available = error.code != "UNAVAILABLE" or NOT_READY in str(error)
        return self._connection.repeats(request) and not available

    async def _answer(self, question: Question, left: Left) -> Answer:
        """Ask; once more if what was remembered is old, or the version has left meanwhile."""
        remembered = self._remembered(question.model, question.version) is not None
        try:
            return await self._ask(question, left)
        except (ValueError, ServerError) as error:
            code = getattr(error, "code", "INVALID_ARGUMENT")
            old = remembered and code == "INVALID_ARGUMENT"
            gone = code == "NOT_FOUND" or NOT_READY in str(error)
            was_there = self._remembered(question.model, question.version) is not None
            if not old and not (gone and was_there):
                raise
        self._forget(question.model)
        return await self._ask(question, left)

    async def _ask(self, question: Question, left: Left) -> Answer:
        about = await self._about(question.model, question.version, left)
        if len(about.inputs) != 1:
            raise ServerError(
                f"{question.model} has {len(about.inputs)} inputs, this client fills one",
                code="UNIMPLEMENTED",
            )
        requests = question.requests(about)
        first = next(requests)
        first.model_version = question.version
        replies = [await self._first(first, question.rows, about, left)]
        version = replies[0].version or question.version
        replies += await self._rest(requests, version, left)
        about = await self._about(question.model, version, left)  # of the one that answered
        outputs = messages.concatenated(replies)
        return Answer(question.model, version, messages.labels(about), outputs)

    async def _first(
        self,
        request: pb.ModelInferRequest,
        rows: int,
        about: pb.ModelMetadataResponse,
        left: Left,
    ) -> Reply:
        """Send the first request, joined with others' if it is small and the only one."""
        limit = min(self._connection.coalesce_rows, messages.max_rows(about))
        if messages.rows_in(request) == rows < limit:
            try:
                reply = await self._wire.join(request, limit, left())
            except ServerError as error:
                if not self._waits(request, error):
                    raise
                reply = None
            if reply is not None:
                return reply
        return await self._reply(request, self._infer(request, left), left)

    async def _rest(
        self, requests: Iterator[pb.ModelInferRequest], version: str, left: Left
    ) -> list[Reply]:
        """Send the others to one version, some at a time; the replies are in their order."""
        replies: list[Reply] = []
        flying: deque[tuple[pb.ModelInferRequest, Sent]] = deque()

        async def land() -> None:
            request, sent = flying.popleft()
            replies.append(await self._reply(request, self._landed(request, sent, left), left))

        try:
            for request in requests:
                request.model_version = version
                flying.append((request, self._wire.start(request, left())))
                if len(flying) == PARTS_IN_FLIGHT:
                    await land()
            while flying:
                await land()
        finally:
            for _, sent in flying:
                sent.cancel()
        return replies

    async def _landed(
        self, request: pb.ModelInferRequest, sent: Sent, left: Left
    ) -> pb.ModelInferResponse:
        try:
            return await sent.response()
        except ServerError as error:
            if not self._waits(request, error):
                raise
        return await self._infer(request, left)

    async def _reply(
        self,
        request: pb.ModelInferRequest,
        response: Coroutine[Any, Any, pb.ModelInferResponse],
        left: Left,
    ) -> Reply:
        """Read a response; pictures that are refused together are sent one by one."""
        try:
            return messages.read(await response, messages.rows_in(request))
        except ServerError as error:
            pictures = request.inputs[0].datatype == messages.PICTURES
            if error.code != "INVALID_ARGUMENT" or not pictures or messages.rows_in(request) == 1:
                raise
        first, *others = messages.one_by_one(request)
        replies = [await self._reply(first, self._infer(first, left), left)]
        replies += await self._rest(iter(others), replies[0].version, left)
        return Reply(replies[0].version, messages.concatenated(replies))

    def _infer(
        self, request: pb.ModelInferRequest, left: Left
    ) -> Coroutine[Any, Any, pb.ModelInferResponse]:
        return self._sent(request, pb.ModelInferResponse, left())

    async def _about(self, model: str, version: str, left: Left) -> pb.ModelMetadataResponse:
        about = self._remembered(model, version)
        if about is None:
            about = await self.metadata(model, version, timeout_s=left())
            self._known[model, version] = time.monotonic() + METADATA_S, about
        return about

    async def _decoded(self, rows: parity_pb2.SampledRows) -> SampledRows | None:
        """View sampled rows as arrays; None if their version has left."""
        remembered = self._remembered(rows.model, rows.version) is not None
        left = self._left(None)
        try:
            about = await self._about(rows.model, rows.version, left)
            try:
                return _arrays(rows, about)
            except ServerError:
                if not remembered:
                    raise
            self._forget(rows.model)  # it is another by now, under the same number
            return _arrays(rows, await self._about(rows.model, rows.version, left))
        except ServerError as error:
            if error.code == "NOT_FOUND" or NOT_READY in str(error):
                return None
            raise

    def _remembered(self, model: str, version: str) -> pb.ModelMetadataResponse | None:
        until_s, about = self._known.get((model, version), (0.0, None))
        return about if time.monotonic() < until_s else None

    def _forget(self, model: str) -> None:
        for key in [key for key in tuple(self._known) if key[0] == model]:
            self._known.pop(key, None)


def _arrays(rows: parity_pb2.SampledRows, about: pb.ModelMetadataResponse) -> SampledRows:
    name = about.properties.get("parity.output", "")
    output = next((one for one in about.outputs if one.name == name), None)
    if output is None or len(about.inputs) != 1:
        raise ServerError(
            f"the server does not say which output of {about.name} parity is measured on",
            code="UNIMPLEMENTED",
        )
    spec = about.inputs[0]
    return SampledRows(
        rows.model,
        rows.version,
        rows.parent_sha256,
        _array(rows.input, rows.rows, DTYPE[spec.datatype], spec.shape[1:]),
        _array(rows.output, rows.rows, np.dtype(np.float32), output.shape[1:]),
        rows.dropped,
    )


def _array(content: bytes, rows: int, dtype: np.dtype[Any], shape: Sequence[int]) -> NDArray[Any]:
    """View rows as an array; of several free sizes none is known, and a row is flat."""
    free = sum(size < 0 for size in shape)
    wanted = (rows, *shape) if free < 2 else (rows, -1)  # noqa: PLR2004
    known = rows * dtype.itemsize * math.prod(size for size in wanted[1:] if size > 0)
    if not rows or not known or len(content) % known or (not free and len(content) != known):
        raise ServerError(
            f"the server sent {len(content)} bytes as {rows} rows of shape {list(shape)} {dtype}",
            code="INTERNAL",
        )
    return np.frombuffer(content, dtype).reshape(wanted)


def _contents(pictures: Sequence[bytes | str | Path]) -> list[bytes]:
    return [one if isinstance(one, bytes) else content(Path(one)) for one in pictures]
