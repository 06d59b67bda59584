"""One ONNX model in onnxruntime: load it, warm it up, run one batch.

The only module that knows onnxruntime. It is given a whole batch and returns a whole batch; who
asked for which row is not its business.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from protos import bundle_pb2
from service.errors import ModelError
from service.tensors import DTYPE

RUNTIME = f"onnxruntime {onnxruntime.__version__}"
OPTIMIZATION = {
    "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
WIRE = {
    "tensor(uint8)": "UINT8",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
}
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a model; the first dimension is the batch, -1."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Session:
    """A model that is loaded. `run` may be called from several threads at once."""

    def __init__(self, model: bytes, options: bundle_pb2.SessionOptions, *, threads: int) -> None:
        """Load the model on the CPU; blocks, and holds the interpreter's lock meanwhile.

        Args:
            model: the content of the .onnx file.
            options: what its parity was measured with.
            threads: in one model call; onnxruntime's own guess ignores a container's limits.

        Raises:
            ModelError: onnxruntime refuses the model or the options.
        """
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
        # A thread that spins while it waits for work takes the core the gRPC loop needs.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            for key, value in sorted(options.config.items()):
                settings.add_session_config_entry(key, value)
            self._session = onnxruntime.InferenceSession(
                model,
                settings,
                providers=["CPUExecutionProvider"],
                enable_fallback=False,  # it would try the same provider again and print about it
            )
            inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
            self.inputs = tuple(_tensor(node) for node in inputs)
            self.outputs = tuple(_tensor(node) for node in outputs)
            self.metadata: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        except ModelError:
            raise
        except Exception as error:
            # onnxruntime's exceptions share no base class but Exception.
            raise ModelError(f"{RUNTIME} cannot load the model: {error}") from error

    def run(self, batch: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """Answer one batch; releases the interpreter's lock while it computes.

        Args:
            batch: the model's one input, of its dtype, (rows, ...); at least one row.

        Returns:
            Every output by its name, each with `rows` as its first dimension.

        Raises:
            ModelError: onnxruntime failed, or an output has another number of rows.
        """
        names = [output.name for output in self.outputs]
        try:
            arrays = self._session.run(names, {self.inputs[0].name: batch})
        except Exception as error:
            raise ModelError(f"{RUNTIME} cannot run the model: {error}") from error
        answers = dict(zip(names, arrays, strict=True))
        for name, array in answers.items():
            if len(array) != len(batch):
                raise ModelError(f"{name} has {len(array)} rows, expected {len(batch)}")
        return answers

    def warm_up(self, max_rows: int) -> None:
        """Run every rung once, the largest first, so that memory is taken once and for all.

        Raises:
            ModelError: a rung fails.
        """
        spec = self.inputs[0]
        for rows in rungs(max_rows):
            self.run(np.zeros((rows, *spec.shape[1:]), DTYPE[spec.datatype]))


def rungs(max_rows: int) -> list[int]:
    """Return the batch sizes a model is warmed with: `max_rows`, then powers of two below it."""
    below = (2**power for power in range(max_rows.bit_length()))
    return [max_rows, *sorted((rows for rows in below if rows < max_rows), reverse=True)]


def cores() -> int:
    """Return how many cores this process may use: its affinity, cut to its cgroup's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(affinity or 1, _quota(CPU_MAX)))


def _quota(cpu_max: Path) -> int:
    """Return the cores of a cgroup v2 `cpu.max` file, rounded up; very many if it sets none."""
    unlimited = 1 << 16
    try:
        quota, period = cpu_max.read_text().split()
        return unlimited if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return unlimited


def _tensor(node: onnxruntime.NodeArg) -> Tensor:
    if node.type not in WIRE:
        raise ModelError(f"{node.name} is {node.type}, expected one of {sorted(WIRE)}")
    shape = tuple(size if isinstance(size, int) else -1 for size in node.shape)
    return Tensor(node.name, WIRE[node.type], shape)
