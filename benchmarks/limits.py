"""What the model itself does, without a server: each time a line comes in, a line of JSON goes out.

    python benchmarks/limits.py onnx model.onnx
    python benchmarks/limits.py saved-model saved_model

Figures are of one caller with a single image, and of as many callers as there are cores with
batches of 128: images a second, and the processor time of a call in milliseconds.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from numpy.typing import NDArray

from service.host import cores

BATCH_ROWS = 128
SLICE_S = 0.7
Run = Callable[[NDArray[np.uint8]], object]


def onnx(path: str) -> Run:
    """Return a call of an ONNX file, with the options that serving uses."""
    from pathlib import Path

    from protos import bundle_pb2
    from service.session import Session

    options = bundle_pb2.SessionOptions(graph_optimization="all")
    return Session(Path(path).read_bytes(), options, threads=1).run


def saved_model(path: str) -> Run:
    """Return a call of a SavedModel, on one thread a call."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    loaded = tf.saved_model.load(path)
    signature = loaded.signatures["serving_default"]

    def run(images: NDArray[np.uint8]) -> object:
        _ = loaded  # or its variables would go
        return signature(image=tf.constant(images))["probabilities"].numpy()

    return run


def measure(run: Run, images: NDArray[np.uint8], callers: int) -> tuple[float, float]:
    """Return images a second, and milliseconds of processor time a call."""
    calls = [0] * callers
    run(images)
    until_s = time.monotonic() + SLICE_S

    def call(caller: int) -> None:
        while time.monotonic() < until_s:
            run(images)
            calls[caller] += 1

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(callers)]
    started_s, before_s = time.monotonic(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s, cpu_s = time.monotonic() - started_s, time.process_time() - before_s
    return sum(calls) * len(images) / took_s, cpu_s / sum(calls) * 1e3


def main() -> None:
    """Measure whenever told to."""
    kind, path = sys.argv[1:]
    run = {"onnx": onnx, "saved-model": saved_model}[kind](path)
    images = np.random.default_rng(0).integers(0, 256, (BATCH_ROWS, 28, 28, 1), np.uint8)
    for _ in sys.stdin:
        one = measure(run, images[:1], 1)
        batch = measure(run, images, cores())
        print(
            json.dumps(
                {
                    "images_per_second_1": one[0],
                    "cpu_ms_1": one[1],
                    "images_per_second_128": batch[0],
                    "cpu_ms_128": batch[1],
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
