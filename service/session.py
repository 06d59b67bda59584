"""One ONNX model in onnxruntime: load it, warm it up, run one batch.

The only module that knows onnxruntime. It is given a whole batch and returns a whole batch; who
asked for which row is not its business.
"""

import io
import logging
import os
import re
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from protos import bundle_pb2
from service.errors import ModelError

# Since 1.29 its wheels tell their maker which models are loaded, unless they are told not to before
# they are loaded themselves.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

log = logging.getLogger(__name__)
RUNTIME = f"onnxruntime {onnxruntime.__version__}"
OPTIMIZATION = {
    "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
WIRE = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
}
CPU = ("CPUExecutionProvider",)
CUDA = "CUDAExecutionProvider"
# What each is told. TF32 would round a GPU's products to 10 bits, far over the budget of float32;
# an exhaustive search for algorithms would be made again for every number of rows.
PROVIDER_OPTIONS = {CUDA: {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}}
# In one call of onnxruntime on a CPU. Its arena grows with the rows (11 GB for 100,000 small
# images) and is kept. Convolutions are no faster beyond, some leave the caches; dense layers gain
# a tenth from twice as many (benchmarks/graph.py).
MAX_CALL_ROWS = 64
# cuDNN plans a convolution for the number of rows it last had, and again whenever that changes: a
# call of a network of two convolutions then takes 3.3 ms on an H200, otherwise 0.16. So there a
# call has one of these numbers of rows, each with a session of its own; what lacks is filled up.
CUDA_ROWS = (1, 4, 16, 64, 256)
# What a manifest may set: switches of the arithmetic. Others name files, which onnxruntime would
# read and write for whoever may write a manifest.
SWITCHES = frozenset(
    {
        "session.disable_quant_qdq",
        "session.dynamic_block_base",
        "session.enable_quant_qdq_cleanup",
        "session.qdqisint8allowed",
        "session.set_denormal_as_zero",
        "session.x64quantprecision",
    }
)
SWITCHED = re.compile(r"[0-9]{1,4}")
# What went wrong on a GPU, among where in the sources and on which host.
FAILURE = re.compile(r"(?:CUDA|CUDNN|CUBLAS|CUFFT)\w* failure \d+: [^;]+")
# Where onnxruntime's own sources were built, and the frames it appends; nobody's business here.
SOURCES = re.compile(r"\s*\S*/onnxruntime_src/.*", re.DOTALL)
MAX_REASON_CHARACTERS = 400


class Tensor(NamedTuple):
    """One input or output of a model; the first dimension is the batch, -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Session:
    """A model that is loaded. `run` may be called from several threads at once."""

    def __init__(
        self,
        model: bytes,
        options: bundle_pb2.SessionOptions,
        *,
        threads: int,
        providers: Sequence[str] = CPU,
    ) -> None:
        """Load the model; blocks.

        Args:
            model: the content of the .onnx file.
            options: what its parity was measured with.
            threads: in one model call; onnxruntime's own guess ignores a container's limits.
            providers: onnxruntime's names, best first.

        Raises:
            ModelError: onnxruntime refuses the model or the options, or lacks a provider.
        """
        missing = sorted(set(providers) - set(available_providers()))
        if missing:
            raise ModelError(
                f"{RUNTIME} has no {', '.join(missing)}, only {', '.join(available_providers())}; "
                "install the extra gpu instead of service, or choose others with --providers"
            )
        settings = _settings(options, threads)
        if CUDA in providers:
            _find_cuda()
        self._sizes = CUDA_ROWS if CUDA in providers else ()
        try:
            self._sessions = [
                _session(model, settings, providers) for _ in range(max(1, len(self._sizes)))
            ]
            first = self._sessions[0]
            inputs, outputs = first.get_inputs(), first.get_outputs()
            self.inputs = tuple(_tensor(node) for node in inputs)
            self.outputs = tuple(_tensor(node) for node in outputs)
            self._names = [output.name for output in self.outputs]
            self.providers: tuple[str, ...] = tuple(first.get_providers())
            _check_started(providers, self.providers)
            self._call_rows = call_rows(self.providers)
            self.metadata: Mapping[str, str] = first.get_modelmeta().custom_metadata_map
        except ModelError:
            raise
        except Exception as error:
            # onnxruntime's exceptions share no base class but Exception.
            raise ModelError(f"{RUNTIME} cannot load the model: {_reason(error)}") from error

    def run(self, batch: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """Answer one batch, of any size; releases the interpreter's lock while it computes.

        Args:
            batch: the model's one input, of its dtype, (rows, ...); at least one row.

        Returns:
            Every output by its name, each with `rows` as its first dimension.

        Raises:
            ModelError: onnxruntime failed, or an output has another number of rows.
        """
        size = self._call_rows
        if len(batch) <= size:
            return self._call(batch)
        parts = [self._call(batch[at : at + size]) for at in range(0, len(batch), size)]
        try:
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        except ValueError as error:
            raise ModelError(f"the outputs for rows of one batch differ: {error}") from error

    def _call(self, batch: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        if not self._sizes:
            return self._answers(self._sessions[0], batch)
        rows = len(batch)
        place = bisect_left(self._sizes, rows)
        if missing := self._sizes[place] - rows:  # filled up with copies of the last row
            batch = np.concatenate((batch, np.repeat(batch[-1:], missing, axis=0)))
        answers = self._answers(self._sessions[place], batch)
        return {name: array[:rows] for name, array in answers.items()}

    def _answers(
        self, session: onnxruntime.InferenceSession, batch: NDArray[np.generic]
    ) -> dict[str, NDArray[np.generic]]:
        names = self._names
        try:
            arrays = session.run(names, {self.inputs[0].name: batch})
        except Exception as error:
            raise ModelError(f"{RUNTIME} cannot run the model: {_reason(error)}") from error
        answers = dict(zip(names, arrays, strict=True))
        for name, array in answers.items():
            if len(array) != len(batch):
                raise ModelError(f"{name} has {len(array)} rows, expected {len(batch)}")
        return answers

    def warm_up(self, max_rows: int, row: NDArray[np.generic]) -> dict[int, float]:
        """Run every rung, the largest first, so that memory is taken once and for all.

        Args:
            max_rows: the largest rung, if a single call may have as many.
            row: one row of an input, without the batch; it is repeated.

        Returns:
            Seconds that a call of each rung took once it was warm.

        Raises:
            ModelError: a rung fails.
        """
        seconds = {}
        for rows in rungs(min(max_rows, self._call_rows)):
            batch = np.repeat(row[np.newaxis], rows, axis=0)
            self.run(batch)
            started_s = time.perf_counter()
            self.run(batch)
            seconds[rows] = time.perf_counter() - started_s
        return seconds


def _session(
    model: bytes, settings: onnxruntime.SessionOptions, providers: Sequence[str]
) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        model,
        settings,
        providers=[(name, PROVIDER_OPTIONS.get(name, {})) for name in providers],
        enable_fallback=False,  # it would try the same provider again and print about it
    )


def available_providers() -> tuple[str, ...]:
    """Return the execution providers that this onnxruntime was built with."""
    return tuple(onnxruntime.get_available_providers())


@cache
def _find_cuda() -> None:
    """Have NVIDIA's libraries loaded from the wheels beside onnxruntime's, if they are there."""
    said = io.StringIO()
    with redirect_stdout(said):  # which is where this process says its address
        onnxruntime.preload_dlls()
    for line in said.getvalue().splitlines():
        log.info("onnxruntime: %s", line)


def _check_started(asked: Sequence[str], started: Sequence[str]) -> None:
    """Refuse a session that onnxruntime made without a provider, as it does without a word."""
    absent = [name for name in asked if name not in started]
    if absent:
        raise ModelError(
            f"{RUNTIME} could not start {', '.join(absent)} on this host: a device, its driver or "
            "a library is missing, or not of a version that goes with it; mend that, or choose "
            "others with --providers"
        )


def call_rows(providers: Sequence[str]) -> int:
    """Return the most rows of one call of onnxruntime, by its providers, best first."""
    return CUDA_ROWS[-1] if CUDA in providers else MAX_CALL_ROWS


def rungs(max_rows: int) -> list[int]:
    """Return the batch sizes a model is warmed with: `max_rows`, then powers of two below it."""
    below = (2**power for power in range(max_rows.bit_length()))
    return [max_rows, *sorted((rows for rows in below if rows < max_rows), reverse=True)]


def _settings(options: bundle_pb2.SessionOptions, threads: int) -> onnxruntime.SessionOptions:
    if options.graph_optimization not in OPTIMIZATION:
        raise ModelError(
            f"graph_optimization is {options.graph_optimization!r}, "
            f"expected one of {sorted(OPTIMIZATION)}"
        )
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = OPTIMIZATION[options.graph_optimization]
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # A pattern is kept for every batch size; the arena alone, warmed largest first, stays put.
    settings.enable_mem_pattern = False
    # A thread that spins while it waits for work takes the core the gRPC loop needs.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for key, value in sorted(options.config.items()):
        if key not in SWITCHES or not SWITCHED.fullmatch(value):
            raise ModelError(
                f"the session option {key[:64]!r} is {value[:64]!r}, expected numbers for "
                f"{', '.join(sorted(SWITCHES))}"
            )
        settings.add_session_config_entry(key, value)
    return settings


def _reason(error: Exception) -> str:
    """Return what onnxruntime says, on one line and without what it says about its own sources."""
    failure = FAILURE.search(str(error))
    said = " ".join((failure[0] if failure else SOURCES.sub("", str(error))).split())
    return said if len(said) <= MAX_REASON_CHARACTERS else f"{said[: MAX_REASON_CHARACTERS - 1]}…"


def _tensor(node: onnxruntime.NodeArg) -> Tensor:
    if node.type not in WIRE:
        raise ModelError(f"{node.name} is {node.type}, expected one of {sorted(WIRE)}")
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
    return Tensor(node.name, WIRE[node.type], shape)
