"""The model behind LitServe, over HTTP: raw uint8 pixels in, raw float32 probabilities out.

.venv-peers/litserve/bin/python benchmarks/peers/litserve_server.py --model MODEL.onnx --port PORT
"""

import argparse
import signal
from typing import Annotated

import numpy as np
import onnxruntime
from fastapi import Body, Response
from litserve import LitAPI, LitServer
from numpy.typing import NDArray


class Classifier(LitAPI):
    """The model, in a worker process."""

    def __init__(self, model: str) -> None:
        # No batching: with max_batch_size=64 single images were as fast, large requests slower.
        super().__init__(max_batch_size=1)
        self._model = model

    def setup(self, device: str) -> None:
        """Open the model, in the worker."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self._model, options)

    def decode_request(self, request: Annotated[bytes, Body()]) -> NDArray[np.uint8]:
        """Return a request's images; how many there are follows from its length."""
        return np.frombuffer(request, np.uint8).reshape(-1, 28, 28, 1)

    def predict(self, x: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the probabilities of images."""
        answers: NDArray[np.float32]
        [answers] = self._session.run(["probabilities"], {"image": x})
        return answers

    def encode_response(self, output: NDArray[np.float32]) -> Response:
        """Return a request's probabilities, row-major."""
        return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    # LitServe ends its processes on ctrl-C alone.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # One worker feeds two HTTP servers, which are what is slow; a second worker gained nothing.
    server = LitServer(Classifier(arguments.model), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=arguments.port,
        num_api_servers=2,
        log_level="warning",
        access_log=False,
        generate_client_file=False,
    )


if __name__ == "__main__":
    main()
