"""The model behind BentoML, over HTTP: raw uint8 pixels in, raw float32 probabilities out.

.venv-peers/bentoml/bin/python benchmarks/peers/bentoml_server.py --model MODEL.onnx --port PORT
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
import onnxruntime
from bentoml.validators import ContentType
from numpy.typing import NDArray
from pydantic import AfterValidator, PlainSerializer

RAW = ContentType("application/octet-stream")


def images(pixels: bytes) -> NDArray[np.uint8]:
    """Return a request's images; how many there are follows from its length."""
    return np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28, 1)


def raw(answers: NDArray[np.float32]) -> bytes:
    """Return a request's probabilities, row-major."""
    return answers.tobytes()


Pixels = Annotated[bytes, AfterValidator(images), RAW]
Probabilities = Annotated[np.ndarray, PlainSerializer(raw), RAW]


# As numbers in JSON, BentoML's default, 128 images took 300 ms and more.
@bentoml.service(
    workers=2,
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Classifier:
    """The model, in each of two processes.

    No adaptive batching: it was slower and refused some of 64 single images in flight as
    overload. A coroutine, not a function: BentoML runs the latter in a thread, which was slower.
    """

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["MODEL"], options)

    @bentoml.api(route="/predict")
    async def predict(self, pixels: Pixels, /) -> Probabilities:
        """Return the probabilities of a request's images."""
        answers: NDArray[np.float32]
        [answers] = self._session.run(["probabilities"], {"image": pixels})
        return answers


def main() -> None:
    """Become `bentoml serve`, which ends with SIGTERM and takes its workers along."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", required=True)
    arguments = parser.parse_args()
    os.environ |= {
        "MODEL": str(Path(arguments.model).resolve()),
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": f"{sys.prefix}/home",  # else in the user's
    }
    here = Path(__file__)
    service = [f"{here.stem}:Classifier", "--working-dir", str(here.parent)]
    address = ["--host", "127.0.0.1", "--port", arguments.port]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", *service, *address])


if __name__ == "__main__":
    main()
