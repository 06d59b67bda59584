"""The model behind Ray Serve, over HTTP: raw uint8 pixels in, raw float32 probabilities out.

.venv-peers/ray/bin/python benchmarks/peers/ray_server.py --model MODEL.onnx --port PORT

Ray reads its environment when it is imported, so some of that is set between the imports.
"""

import argparse
import os
import re
import signal
import socket
import sys
import tempfile
from pathlib import Path

# What Ray Serve's documentation calls its high-throughput mode: HAProxy in front of the replicas
# instead of a proxy in Python. It served ten times as many single images; over gRPC, half as many.
os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
os.environ |= {"RAY_SERVE_HAPROXY_METRICS_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # a node on 127.0.0.1, as on those systems
os.environ["RAY_AUTH_MODE"] = "disabled"  # else a token is written into the user's home

import numpy as np
import onnxruntime
import ray
from grpc.aio import _server
from ray import serve
from ray.serve._private import haproxy
from starlette.requests import Request
from starlette.responses import Response

PORTS = (  # the dashboard agent's, 52365, cannot be set; the agent does without it
    "AUTOSCALER_METRIC_PORT",
    "DASHBOARD_METRIC_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
)
FILES = {
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "METRICS_SOCKET_PATH": "metrics.sock",
    "SERVER_STATE_BASE": "",
    "SERVER_STATE_FILE": "server-state",
}


class Classifier:
    """The model, in each of two processes.

    No @serve.batch: single images gained nothing, large requests took twice as long.
    """

    def __init__(self, model: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)

    async def __call__(self, request: Request) -> Response:
        """Return the probabilities of a request's images, row-major."""
        images = np.frombuffer(await request.body(), np.uint8).reshape(-1, 28, 28, 1)
        [answers] = self._session.run(["probabilities"], {"image": images})
        return Response(answers.tobytes(), media_type="application/octet-stream")


class LocalGrpcServer(_server.Server):
    """A gRPC server on 127.0.0.1 where Ray asks for every address."""

    def add_insecure_port(self, address: str) -> int:
        """Listen on the port of `[::]:PORT`."""
        return super().add_insecure_port(address.replace("[::]", "127.0.0.1"))


def listen_here() -> None:
    """Make one of Ray's processes listen on 127.0.0.1 alone, for which there is no setting."""
    _server.Server = LocalGrpcServer  # type: ignore[misc]
    template = haproxy.HAPROXY_CONFIG_TEMPLATE  # type: ignore[attr-defined]
    bound = re.sub(r"bind \*?:", "bind 127.0.0.1:", template)
    haproxy.HAPROXY_CONFIG_TEMPLATE = bound  # type: ignore[attr-defined]


def free_ports(count: int) -> list[int]:
    """Return so many different ports that nothing listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    ports = zip(PORTS, free_ports(len(PORTS)), strict=True)
    os.environ |= {name: str(port) for name, port in ports}
    quiet = {"enable_access_log": False, "log_level": "WARNING"}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        for name, file in FILES.items():
            os.environ[f"RAY_SERVE_HAPROXY_{name}"] = f"{folder}/{file}"
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": listen_here},
            _temp_dir=folder,
        )
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        try:
            http = {"host": "127.0.0.1", "port": arguments.port}
            serve.start(http_options=http, logging_config=quiet)
            # max_ongoing_requests: more than are ever in flight; a replica takes 5 by default
            deployment = serve.deployment(num_replicas=2, max_ongoing_requests=1000)(Classifier)
            model = str(Path(arguments.model).resolve())
            serve.run(deployment.bind(model), logging_config=quiet)
            signal.pause()
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
