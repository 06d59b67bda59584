"""conv10 behind LitServe, over HTTP: raw uint8 pixels in, raw float32 probabilities out.

.venv-peers/litserve/bin/python benchmarks/peers/litserve_server.py --model MODEL.onnx --port PORT
"""

import argparse
import os
from typing import Annotated

import litserve
import numpy as np
import onnxruntime
from fastapi import Body, Response
from numpy.typing import NDArray


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["MODEL"], options)

    def decode_request(self, request: Annotated[bytes, Body()]) -> NDArray[np.uint8]:
        return np.frombuffer(request, np.uint8).reshape(-1, 28, 28, 1)

    def batch(self, inputs):
        self._ends = np.cumsum([len(images) for images in inputs])[:-1]
        return np.concatenate(inputs)

    def unbatch(self, output):
        return np.split(output, self._ends)

    def predict(self, x):
        return self._session.run(["probabilities"], {"image": x})[0]

    def encode_response(self, output) -> Response:
        return Response(output.tobytes(), media_type="application/octet-stream")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    os.environ["MODEL"] = arguments.model
    import signal; signal.signal(signal.SIGTERM, signal.default_int_handler)
    e = os.environ.get
    kw = dict(max_batch_size=int(e("B", 64)), batch_timeout=float(e("T", 0.001)))
    server = litserve.LitServer(Classifier(**kw), accelerator="cpu", workers_per_device=int(e("W", "1")))
    if e("Z"):
        server.transport_config.transport_type = "zmq"
    server.run(host="127.0.0.1", port=arguments.port, log_level="warning", generate_client_file=False, access_log=False,
        num_api_servers=int(e("S", "1")))


if __name__ == "__main__":
    main()
