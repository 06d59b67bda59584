"""What a good user writes in an hour: the servers that ours is compared with.

    python benchmarks/naive.py aio --model model.onnx --port 8001

One model, one method, no batching, no checks; grpcio's own servers, as their documentation uses
them, and a session with the options that suit two cores best.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import grpc
import numpy as np
import onnxruntime
import typer

from protos import inference_pb2, inference_pb2_grpc

THREADS = 10  # as grpcio's examples
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
app = typer.Typer()


class Model:
    """An ONNX file, answered from."""

    def __init__(self, path: Path) -> None:
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


@app.command("sync")
def sync(model: Annotated[Path, typer.Option()], port: Annotated[int, typer.Option()]) -> None:
    """Serve with threads."""
    server = grpc.server(ThreadPoolExecutor(THREADS), options=UNLIMITED)
    inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Sync(Model(model)), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    server.wait_for_termination()


@app.command("aio")
def aio(model: Annotated[Path, typer.Option()], port: Annotated[int, typer.Option()]) -> None:
    """Serve with asyncio."""

    async def serve() -> None:
        server = grpc.aio.server(options=UNLIMITED)
        inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Aio(Model(model)), server)
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        await server.wait_for_termination()

    asyncio.run(serve())


if __name__ == "__main__":
    app()
