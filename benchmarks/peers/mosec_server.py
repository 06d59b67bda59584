"""The model behind mosec, over HTTP: raw uint8 pixels in, raw float32 probabilities out.

.venv-peers/mosec/bin/python benchmarks/peers/mosec_server.py --model MODEL.onnx --port PORT
"""

import argparse
import os

import numpy as np
import onnxruntime
from mosec import Server, Worker
from numpy.typing import NDArray


class Classifier(Worker):
    """A process with the model; mosec hands it what has arrived while it was busy."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["MODEL"], options)

    def deserialize(self, data: bytes) -> NDArray[np.uint8]:
        """Return a request's images; how many there are follows from its length."""
        return np.frombuffer(data, np.uint8).reshape(-1, 28, 28, 1)

    def forward(self, data: list[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """Return the probabilities of each request of a batch."""
        [answers] = self._session.run(["probabilities"], {"image": np.concatenate(data)})
        ends = np.cumsum([len(images) for images in data])
        return [answers[end - len(images) : end] for images, end in zip(data, ends, strict=True)]

    def serialize(self, data: NDArray[np.float32]) -> bytes:
        """Return a request's probabilities, row-major."""
        return data.tobytes()


def main() -> None:
    """Serve until SIGTERM; `--port` is mosec's own option, which it reads itself."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", required=True)
    os.environ["MODEL"] = parser.parse_known_args()[0].model
    os.environ |= {"MOSEC_ADDRESS": "127.0.0.1", "MOSEC_LOG_LEVEL": "error"}
    server = Server()
    # A second worker gains nothing on two cores and costs a quarter of the speed of large
    # requests; 1 ms is the least that mosec lets a batch wait.
    server.append_worker(Classifier, num=1, max_batch_size=64, max_wait_time=1)
    server.run()


if __name__ == "__main__":
    main()
