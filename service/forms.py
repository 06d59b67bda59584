"""What requests have in common, so that one like another is neither parsed nor looked up again.

A client that asks again and again sends the same bytes before its tensor: names, shape, the
tensor's length. What those bytes mean is found out once and kept as a form, with the bytes that
every answer to it begins with. A request whose first bytes are a form's, and which is as long, is
one of that form: nothing is left of it but the tensor.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from protos import inference_pb2
from service import tensors
from service.parameters import Parameters
from service.tensors import Output

if TYPE_CHECKING:
    from service.batcher import Batch
    from service.repository import Served

MAX_HEAD_BYTES = 1 << 10
MAX_LENGTHS = 512  # of messages that forms are kept for: batches of every size, of several models
MAX_ALIKE = 4  # forms of messages of one length
RAW_INPUT_TAG = b"\x3a"  # protobuf's keys of raw_input_contents and raw_output_contents
RAW_OUTPUT_TAG = b"\x32"
VARINT_BITS = 7


class _Writing(NamedTuple):
    """How answers are written whose outputs have one layout."""

    layout: tuple[object, ...]
    head: bytes
    parts: tuple[tuple[str, int, bytes], ...]  # output, bytes of a row, what its contents follow


class Form:
    """Everything that requests of one kind ask for, but their tensor. Safe to use from threads."""

    def __init__(
        self, request_id: str, served: "Served", parameters: Parameters, outputs: list[Output]
    ) -> None:
        """Store what a request was found to mean."""
        self.request_id = request_id
        self.served = served
        self.parameters = parameters
        self._outputs = outputs
        self._classifies = any(output.classes for output in outputs)
        self._writing: _Writing | None = None

    def written(self, batch: "Batch", start: int, rows: int) -> bytes:
        """Return the serialised ModelInferResponse with some rows of a batch."""
        if self._classifies:
            response = self._response()
            for output in self._outputs:
                array = batch.answers[output.name][start : start + rows]
                tensors.append_output(response, output, array, self.served.manifest.labels)
            return response.SerializeToString()
        writing = self._writing
        if writing is None or writing.layout != batch.layout:
            writing = self._writing = self._prepared(batch, rows)
        pieces: list[bytes | memoryview] = [writing.head]
        for name, size, key in writing.parts:
            pieces += (key, batch.raw(name)[start * size : (start + rows) * size])
        return b"".join(pieces)

    def _prepared(self, batch: "Batch", rows: int) -> _Writing:
        response, parts = self._response(), []
        for output in self._outputs:
            array = batch.answers[output.name][:rows]
            datatype = tensors.DATATYPE[array.dtype]
            response.outputs.add(name=output.name, datatype=datatype, shape=array.shape)
            key = RAW_OUTPUT_TAG + varint(array.nbytes)
            parts.append((output.name, array.nbytes // rows, key))
        return _Writing(batch.layout, response.SerializeToString(), tuple(parts))

    def _response(self) -> inference_pb2.ModelInferResponse:
        return inference_pb2.ModelInferResponse(
            model_name=self.served.name,
            model_version=str(self.served.number),
            id=self.request_id,
        )


class _Kept:
    """A form, the bytes its requests begin with, and how to view the tensor that follows."""

    __slots__ = ("changes", "count", "dtype", "form", "head", "shape")

    def __init__(self, form: Form, head: bytes, rows: NDArray[np.generic], changes: int) -> None:
        self.form, self.head, self.changes = form, head, changes
        self.dtype, self.shape, self.count = rows.dtype, rows.shape, rows.size


class Forms:
    """The forms of the last requests. Safe to use from several threads at once."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[_Kept, ...]] = {}  # by the messages' length

    def find(self, content: bytes, changes: int) -> tuple[Form, NDArray[np.generic]] | None:
        """Return the form of a message and its rows, a view of it; None if none is known.

        Args:
            content: the serialised ModelInferRequest.
            changes: the repository's count of them: what a form was found to mean before the last
                one may be wrong by now.
        """
        for kept in self._kept.get(len(content), ()):
            if kept.changes == changes and content.startswith(kept.head):
                rows = np.frombuffer(content, kept.dtype, kept.count, len(kept.head))
                return kept.form, rows.reshape(kept.shape)
        return None

    def keep(
        self,
        content: bytes,
        request: inference_pb2.ModelInferRequest,
        form: Form,
        rows: NDArray[np.generic],
        changes: int,
    ) -> None:
        """Keep the form of a message, if its tensor comes last and whatever is in it is one.

        Args:
            content: the serialised ModelInferRequest.
            request: the same, parsed; it loses its raw contents.
            form: of it.
            rows: its tensor.
            changes: the repository's count of them, before the form was found.
        """
        if rows.dtype.kind == "b":  # of which not every byte is a value
            return
        head = _head(content, request)
        if not head:
            return
        if len(self._kept) >= MAX_LENGTHS:
            self._kept.clear()
        alike = [kept for kept in self._kept.get(len(content), ()) if kept.changes == changes]
        new = _Kept(form, head, rows, changes)
        self._kept[len(content)] = (new, *alike[: MAX_ALIKE - 1])


def varint(value: int) -> bytes:
    """Return a number as protobuf writes it: seven bits a byte, the lowest first."""
    written = bytearray()
    while value >> VARINT_BITS:
        written.append(value & 0x7F | 0x80)
        value >>= VARINT_BITS
    return bytes((*written, value))


def _head(content: bytes, request: inference_pb2.ModelInferRequest) -> bytes:
    """Return what comes before the tensor, if the tensor is all that follows; else nothing.

    Messages that are put together parse like their fields one after the other. So where the first
    part is a message without raw contents, and only the raw contents' key and length are between it
    and the tensor, any other tensor of that length would be read the same way.
    """
    if request.id or len(request.raw_input_contents) != 1:
        return b""
    size = len(request.raw_input_contents[0])
    del request.raw_input_contents[:]
    key = RAW_INPUT_TAG + varint(size)
    end = len(content) - size
    lines = content[: max(0, end - len(key))]
    if not size or end > MAX_HEAD_BYTES or content[len(lines) : end] != key:
        return b""
    try:
        same = inference_pb2.ModelInferRequest.FromString(lines) == request
    except DecodeError:
        return b""
    return content[:end] if same else b""
