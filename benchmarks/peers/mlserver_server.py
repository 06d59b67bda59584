"""The model behind MLServer, over gRPC: the Open Inference Protocol with raw contents.

.venv-peers/mlserver/bin/python benchmarks/peers/mlserver_server.py --model MODEL.onnx --port PORT
"""

import argparse
import asyncio

import onnxruntime
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.settings import ModelParameters
from mlserver.types import InferenceRequest, InferenceResponse


class Classifier(MLModel):
    """The model, in the server's own process."""

    async def load(self) -> bool:
        """Open the model and say that it is ready."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self.settings.parameters.uri, options)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Return the probabilities of a request's images."""
        images = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        [answers] = self._session.run(["probabilities"], {"image": images})
        output = NumpyCodec.encode_output("probabilities", answers)
        return InferenceResponse(model_name=self.name, outputs=[output])


async def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    settings = Settings(
        host="127.0.0.1",
        grpc_port=arguments.port,
        http_port=0,  # REST cannot be switched off; the kernel finds it a free port
        metrics_endpoint=None,
        # Its workers do not start with uvloop 0.23; with 0.21 one or two were slower than none.
        parallel_workers=0,
        debug=False,  # it logs every request
    )
    # No adaptive batching: joining the requests' lists of numbers costs more than it saves, with
    # max_batch_size 32 or 64, waiting for 1 ms or not.
    model = ModelSettings(
        name="conv10",
        implementation=Classifier,
        parameters=ModelParameters(uri=arguments.model),
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    asyncio.run(main())
