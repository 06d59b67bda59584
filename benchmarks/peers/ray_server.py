import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
import time
import numpy as np
import onnxruntime
e = os.environ.get
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
root = str(Path(__file__).resolve().parents[2])
os.environ["PYTHONPATH"] = root
sys.path.insert(0, root)
for k in ("RAY_SERVE_ENABLE_HA_PROXY",):
    if e("H"): os.environ[k] = e("H")
if e("O"):
    os.environ["RAY_SERVE_THROUGHPUT_OPTIMIZED"] = "1"
    if e("O") == "1":
        os.environ["RAY_SERVE_ENABLE_DIRECT_INGRESS"] = "0"
def free_ports(n):
    import socket
    ss=[socket.create_server(("127.0.0.1",0)) for _ in range(n)]
    ps=[s.getsockname()[1] for s in ss]
    for s in ss: s.close()
    return ps
if e("H"):
    for k,p in zip(("HAPROXY_METRICS_PORT","HAPROXY_STATS_PORT","FALLBACK_PROXY_HTTP_PORT","FALLBACK_PROXY_GRPC_PORT"),free_ports(4)):
        os.environ["RAY_SERVE_"+k]=str(p)
    os.environ["RAY_SERVE_HAPROXY_METRICS_ENABLED"]=e("MET","0")
    folder=tempfile.mkdtemp(prefix="ray-")
    for k,v in {"CONFIG_FILE_LOC":"haproxy.cfg","SOCKET_PATH":"admin.sock","SERVER_STATE_BASE":"","SERVER_STATE_FILE":"server-state","METRICS_SOCKET_PATH":"metrics.sock"}.items():
        os.environ["RAY_SERVE_HAPROXY_"+k]=folder+"/haproxy/"+v
import ray
from ray import serve
def stay_here():
    import re
    from grpc.aio import _server
    from ray.serve._private import haproxy
    listen = _server.Server.add_insecure_port
    _server.Server.add_insecure_port = lambda self, address: listen(self, address.replace("[::]", "127.0.0.1"))
    haproxy.HAPROXY_CONFIG_TEMPLATE = re.sub(r"bind \*?:", "bind 127.0.0.1:", haproxy.HAPROXY_CONFIG_TEMPLATE)
from starlette.requests import Request
from starlette.responses import Response
BATCH = e("B") != "0"
R = int(e("R", 1))

@serve.deployment(num_replicas=R, max_ongoing_requests=1000, ray_actor_options={"num_cpus": 1}, logging_config={"enable_access_log": False, "log_level": "WARNING"})
class Classifier:
    def __init__(self, model: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(model, options)

    def run(self, images):
        return self._session.run(["probabilities"], {"image": images})[0]

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=float(e("T", 0.001)))
    async def joined(self, requests):
        answers = self.run(np.concatenate(requests))
        ends = np.cumsum([len(images) for images in requests])
        return [answers[end - len(images) : end] for images, end in zip(requests, ends)]

    async def classify(self, pixels):
        images = np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28, 1)
        return await self.joined(images) if BATCH else self.run(images)

    async def __call__(self, request: Request):
        return Response((await self.classify(await request.body())).tobytes())

    async def ModelInfer(self, request):
        from protos import inference_pb2
        answers = await self.classify(request.raw_input_contents[0])
        r = inference_pb2.ModelInferResponse(model_name="conv10", raw_output_contents=[answers.tobytes()])
        r.outputs.add(name="probabilities", datatype="FP32", shape=answers.shape)
        return r

def free_port() -> int:
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False, _node_ip_address="127.0.0.1",
            object_store_memory=200_000_000, runtime_env={'worker_process_setup_hook': stay_here})
        grpc = e("G") != "0"
        serve.start(http_options={"host": "127.0.0.1", "port": free_port() if grpc else a.port},
           grpc_options={"port": a.port, "grpc_servicer_functions": ["protos.inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"]} if grpc else None,
           logging_config={"enable_access_log": False, "log_level": "WARNING"})
        try:
            serve.run(Classifier.bind(str(Path(a.model).resolve())), blocking=False)
            print("running", flush=True)
            signal.pause()
        finally:
            print("shutdown", flush=True)
            if e("SH") == "1": serve.shutdown()
            ray.shutdown()

if __name__ == "__main__":
    main()
