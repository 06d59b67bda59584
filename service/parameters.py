"""The parameters of an inference request that mean something here.

Those of Triton's that this server knows are checked; others of its `triton_` names are refused;
everything else is accepted and means nothing.
"""

import math
from typing import NamedTuple

from protos import inference_pb2
from service.errors import InvalidRequestError
from service.model_config import ModelOptions

RESERVED = "triton_"
FINAL_RESPONSE = "triton_enable_empty_final_response"  # of streams; nothing here answers twice


class Parameters(NamedTuple):
    """How a request is to be treated in the queue."""

    level: int  # of priority, 1 first
    wait_s: float  # the longest, from its arrival; infinity: as long as its caller waits

    @staticmethod
    def read(request: inference_pb2.ModelInferRequest, options: ModelOptions) -> "Parameters":
        """Read a request's parameters.

        Args:
            request: of a client.
            options: how the model is served.

        Raises:
            InvalidRequestError: one has a value or a type that it cannot have.
        """
        for name in request.parameters:
            if name.startswith(RESERVED) and name != FINAL_RESPONSE:
                raise InvalidRequestError(
                    f"parameter keys starting with '{RESERVED}' are reserved for Triton; "
                    f"this server knows no '{name}'"
                )
        if FINAL_RESPONSE in request.parameters:
            _choice(request, FINAL_RESPONSE, ("bool_param",))
        return Parameters(_level(request, options), _wait_s(request, options))


def _level(request: inference_pb2.ModelInferRequest, options: ModelOptions) -> int:
    """Return the queue a request waits in: that of its priority, or the default one."""
    asked = 0
    if "priority" in request.parameters:
        kind = _choice(request, "priority", ("uint64_param", "int64_param"))
        asked = getattr(request.parameters["priority"], kind)
        if asked < 0:
            raise InvalidRequestError(f"the parameter 'priority' is {asked}, expected 0 or more")
    if not options.priority_levels:
        return 1
    return asked if 1 <= asked <= options.priority_levels else options.default_priority


def _wait_s(request: inference_pb2.ModelInferRequest, options: ModelOptions) -> float:
    """Return the longest wait in the queue: the model's, or a shorter one that is asked for."""
    longest = options.queue_timeout_s or math.inf
    if "timeout" not in request.parameters:
        return longest
    kind = _choice(request, "timeout", ("int64_param", "uint64_param"))
    asked: int = getattr(request.parameters["timeout"], kind)
    if asked < 0:
        raise InvalidRequestError(
            f"the parameter 'timeout' is {asked}, expected microseconds, 0 or more"
        )
    if not asked or not options.allow_timeout_override:
        return longest
    return min(longest, asked / 1e6)


def _choice(request: inference_pb2.ModelInferRequest, name: str, expected: tuple[str, ...]) -> str:
    found = request.parameters[name].WhichOneof("parameter_choice")
    if found not in expected:
        raise InvalidRequestError(
            f"the parameter '{name}' is given as {found}, expected {' or '.join(expected)}"
        )
    return str(found)
