"""x"""

import argparse
import os
import sys
from pathlib import Path
from typing import Annotated

import bentoml
import numpy as np
import onnxruntime
from bentoml.validators import ContentType
from pydantic import AfterValidator, PlainSerializer

e = os.environ.get

def images(b): return np.frombuffer(b, np.uint8).reshape(-1, 28, 28, 1)

Images = Annotated[bytes, AfterValidator(images), ContentType("application/octet-stream")]
Probs = Annotated[np.ndarray, PlainSerializer(lambda a: a.tobytes()), ContentType("application/octet-stream")]
kw = {}
if e("M") == "batch":
    kw = dict(batchable=True, max_batch_size=int(e("B", 64)), max_latency_ms=int(e("L", 100)))

@bentoml.service(workers=int(e("W", 2)), threads=int(e("T", 1)), logging={"access": {"enabled": False}}, metrics={"enabled": False}, traffic={"timeout": 60})
class Classifier:
    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(os.environ["MODEL"], options)

    if e("M") == "async":
        @bentoml.api(route="/predict")
        async def predict(self, image: Images, /) -> Probs:
            return self._session.run(["probabilities"], {"image": image})[0]
    elif e("M") == "abatch":
        @bentoml.api(route="/predict", batchable=True, max_batch_size=int(e("B", 64)), max_latency_ms=int(e("L", 100)))
        async def predict(self, image: Images, /) -> Probs:
            return self._session.run(["probabilities"], {"image": image})[0]
    else:
        @bentoml.api(route="/predict", **kw)
        def predict(self, image: Images, /) -> Probs:
            return self._session.run(["probabilities"], {"image": image})[0]

def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", required=True)
    arguments = parser.parse_args()
    os.environ |= {"MODEL": str(Path(arguments.model).resolve()), "BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": str(Path(sys.prefix)/"home")}
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", "bentoml_server:Classifier", "--working-dir", str(Path(__file__).parent), "--host", "127.0.0.1", "--port", arguments.port])


if __name__ == "__main__":
    main()
