"""conv10 behind KServe, over gRPC: the Open Inference Protocol with raw contents.

.venv-peers/kserve/bin/python benchmarks/peers/kserve_server.py --model MODEL.onnx --port PORT
"""

import argparse
import asyncio
import os

import onnxruntime
from kserve import InferRequest, InferResponse, Model, ModelServer


class Classifier(Model):
    """The model in the server's own process."""

    def __init__(self, path: str) -> None:
        super().__init__("conv10")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options)
        self.load()

    def predict(self, payload, headers=None, response_headers=None):
        images = payload.inputs[0].as_numpy()
        [answers] = self._session.run(["probabilities"], {"image": images})
        from kserve.utils.utils import get_predict_response
        from kserve import InferOutput
        o = InferOutput("probabilities", list(answers.shape), "FP32")
        o.set_data_from_numpy(answers)
        return InferResponse(payload.id, self.name, [o])
        
class AClassifier(Classifier):
    async def predict(self, payload, headers=None, response_headers=None):
        return await asyncio.to_thread(Classifier.predict, self, payload)


if __name__ == "__main__":
    import logging
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    logging.getLogger("kserve").setLevel(logging.WARNING)
    logging.getLogger("kserve").addHandler(logging.NullHandler())
    c = AClassifier if os.environ.get("A") else Classifier
    ModelServer(http_port=18199, grpc_port=arguments.port, enable_latency_logging=False).start([c(arguments.model)])
