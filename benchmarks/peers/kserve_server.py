"""The model behind KServe, over gRPC: the Open Inference Protocol with raw contents.

.venv-peers/kserve/bin/python benchmarks/peers/kserve_server.py --model MODEL.onnx --port PORT
"""

import argparse
import logging

import onnxruntime
from grpc.aio import _server
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer, model_server
from kserve.protocol.rest.server import RESTServer


class Classifier(Model):
    """The model, in the server's own process.

    `predict` blocks the event loop, as KServe's own runtimes do: in a thread it was slower.
    """

    def __init__(self, path: str) -> None:
        super().__init__("conv10")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options)
        self.ready = True

    def predict(
        self,
        payload: InferRequest,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        """Return the probabilities of a request's images."""
        images = payload.inputs[0].as_numpy()
        [answers] = self._session.run(["probabilities"], {"image": images})
        output = InferOutput("probabilities", list(answers.shape), "FP32")
        output.set_data_from_numpy(answers)
        return InferResponse(payload.id, self.name, [output])


class LocalGrpcServer(_server.Server):
    """A gRPC server on 127.0.0.1 where KServe asks for every address."""

    def add_insecure_port(self, address: str) -> int:
        """Listen on the port of `[::]:PORT`."""
        return super().add_insecure_port(address.replace("[::]", "127.0.0.1"))


class LocalRestServer(RESTServer):
    """The REST server, which KServe always starts, on 127.0.0.1 too."""

    async def start(self) -> None:
        """Serve until told to stop."""
        self.config.host = "127.0.0.1"
        await super().start()


def main() -> None:
    """Serve until SIGTERM; KServe has no batching in a server, but in a sidecar of Kubernetes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    _server.Server = LocalGrpcServer  # type: ignore[misc]
    model_server.RESTServer = LocalRestServer
    server = ModelServer(http_port=0, grpc_port=arguments.port, enable_latency_logging=False)
    logging.getLogger("kserve").setLevel(logging.WARNING)  # else a line a request
    server.start([Classifier(arguments.model)])


if __name__ == "__main__":
    main()
