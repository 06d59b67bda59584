"""What a good user writes in an hour: the servers that ours is compared with.

    python benchmarks/naive.py aio --model model.onnx --port 8001

One model, one method, no batching, no checks; grpcio's own servers, as their documentation uses
them, and a session with the options that suit two cores best.
"""

import argparse
import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import onnxruntime

from protos import inference_pb2, inference_pb2_grpc

THREADS = 10  # as grpcio's examples
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class Model:
    """An ONNX file, answered from."""

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(path, options)

    def infer(self, request: Any) -> inference_pb2.ModelInferResponse:  # noqa: ANN401
        """Answer one request."""
        tensor = request.inputs[0]
        image = np.frombuffer(request.raw_input_contents[0], np.uint8).reshape(tensor.shape)
        (probabilities,) = self.session.run(["probabilities"], {tensor.name: image})
        response = inference_pb2.ModelInferResponse(model_name=request.model_name)
        response.outputs.add(name="probabilities", datatype="FP32", shape=probabilities.shape)
        response.raw_output_contents.append(probabilities.tobytes())
        return response


class Sync(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """The methods as threads call them."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802, ANN401, D102
        return self.model.infer(request)


class Aio(inference_pb2_grpc.GRPCInferenceServiceServicer):
    """The methods as an event loop calls them."""

    def __init__(self, model: Model) -> None:
        self.model = model

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802, ANN401, D102
        return self.model.infer(request)


def serve_sync(model: Model, address: str) -> None:
    """Serve with threads."""
    server = grpc.server(ThreadPoolExecutor(THREADS), options=UNLIMITED)
    servicer = Sync(model)  # type: ignore[abstract] # the other methods are unimplemented
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    server.start()
    server.wait_for_termination()


async def serve_aio(model: Model, address: str) -> None:
    """Serve with asyncio."""
    server = grpc.aio.server(options=UNLIMITED)
    servicer = Aio(model)  # type: ignore[abstract] # the other methods are unimplemented
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("sync", "aio"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", required=True)
    given = parser.parse_args()
    loaded, place = Model(given.model), f"127.0.0.1:{given.port}"
    if given.kind == "sync":
        serve_sync(loaded, place)
    else:
        asyncio.run(serve_aio(loaded, place))
