"""Other inference servers, and how each is started and asked.

    python -m benchmarks.peers.catalog mosec ray

says of the named ones, or of all, whether they answer as the model does and end when they are told.
Each has its own environment, .venv-peers/NAME, which `benchmarks/peers/setup.sh NAME` makes.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders import ROOT, Contender, grpc_probabilities, message, running
from benchmarks.rounds import Made

HERE = Path(__file__).parent
CLASSES = 10
RAW_HEADERS = (("content-type", "application/octet-stream"),)
NAMES = {  # of their environments and programs
    "mosec": "mosec",
    "mlserver": "MLServer",
    "kserve": "KServe",
    "litserve": "LitServe",
    "bentoml": "BentoML",
    "ray": "Ray Serve",
}
PATHS = {"mosec": "/inference", "litserve": "/predict", "bentoml": "/predict", "ray": "/"}
ROWS = (1, 32, 128)


def contenders(model: Path, keys: Sequence[str]) -> list[Contender]:
    """Return the named peers, to serve this file.

    Raises:
        SystemExit: there is no such peer, or it has no environment.
    """
    for key in keys:
        if key not in NAMES:
            raise SystemExit(f"error: {key!r} is no peer; expected some of {', '.join(NAMES)}")
        if not (ROOT / f".venv-peers/{key}/.installed").exists():
            raise SystemExit(f"error: {key} is not installed; run: benchmarks/peers/setup.sh {key}")
    return [_over_http(key, model) if key in PATHS else _over_grpc(key, model) for key in keys]


def _over_grpc(key: str, model: Path) -> Contender:
    return Contender(
        NAMES[key],
        lambda port: _command(key, model, port),
        lambda images: message(images, "conv10"),
        grpc_probabilities,
    )


def _over_http(key: str, model: Path) -> Contender:
    """Return a peer that is sent pixels and sends probabilities, with nothing around them."""
    return Contender(
        NAMES[key],
        lambda port: _command(key, model, port),
        lambda images: images.tobytes(),
        _raw_probabilities,
        PATHS[key],
        RAW_HEADERS,
        http2=False,
    )


def _command(key: str, model: Path, port: int) -> list[str]:
    """Return what serves on 127.0.0.1, in the foreground, until SIGTERM."""
    python, program = ROOT / f".venv-peers/{key}/bin/python", HERE / f"{key}_server.py"
    return [str(python), str(program), "--model", str(model), "--port", str(port)]


def _raw_probabilities(answer: bytes) -> NDArray[np.float32]:
    return np.frombuffer(answer, np.float32).reshape(-1, CLASSES)


def main() -> None:
    """Start each peer in turn, compare its answers, and see it end."""
    with tempfile.TemporaryDirectory() as folder:
        made = Made.make(Path(folder), "conv10")
        for peer in contenders(made.onnx, sys.argv[1:] or list(NAMES)):
            with running(peer, made.images) as server:
                for rows in ROWS:
                    server.request(made.images[:rows], made.expected[:rows])
            print(f"{peer.name}: first answer after {server.first_answer_s:.1f} s, right, ended")


if __name__ == "__main__":
    main()
