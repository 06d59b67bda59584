"""What a GPU gives: one bundle served with CUDA and without, and how far apart the answers are.

    python benchmarks/gpu.py models

Needs an NVIDIA GPU, the extra gpu, and version 1, alone, of one model with uint8 images and the
outputs of ours, as `make run` leaves it in models. Both servers are the native front's, asked by
h2load in turn, round after round; shown are medians. The same file is called in this process as
well, with either provider, on random images. Writes benchmarks/results/gpu.json.
"""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks import load, measured, shown
from benchmarks.contenders import ours, running
from benchmarks.load import Load
from benchmarks.rounds import OPTIONS, Case, Measured
from service import host
from service.session import CPU, CUDA, Session

SECONDS = 1.0
CASES = (
    Case("1 image, 1 in flight", 1, Load(1)),
    Case("1 image, 64 in flight", 1, Load(1, 64)),
    Case("1 image, 512 in flight over 8 connections", 1, Load(8, 64)),
    Case("128 images, 4 in flight", 128, Load(4)),
    Case("128 images, 16 in flight", 128, Load(16)),
)
PROVIDERS = {"cuda": (CUDA, *CPU), "cpu": CPU}
COMPARED = 8192  # random images
OUTPUTS = ("logits", "probabilities")


def main(
    repository: Annotated[Path, typer.Argument(help="Folder with version 1 of one model.")],
    times: Annotated[int, typer.Option("--rounds", min=3, help="Medians are of these.")] = 5,
) -> None:
    """Measure, print and write."""
    load.check_installed()
    content = next(repository.glob("*/1/model.onnx")).read_bytes()
    sessions = {
        name: Session(content, OPTIONS, threads=1, providers=providers)
        for name, providers in PROVIDERS.items()
    }
    (tensor,) = sessions["cpu"].inputs
    images = np.random.default_rng(0).integers(0, 256, (COMPARED, *tensor.shape[1:]), np.uint8)
    answers = {name: session.run(images) for name, session in sessions.items()}
    logits, expected = (
        {name: answer[output].astype(np.float32) for name, answer in answers.items()}
        for output in OUTPUTS
    )
    apart = float(np.abs(logits["cuda"] - logits["cpu"]).max())
    print(f"{COMPARED} random images: the logits are at most {apart:.2g} apart")
    found = Measured()
    with ExitStack() as stack:
        servers = {}
        for name in PROVIDERS:
            options = ("--front", "native", "--providers", "cpu" if name == "cpu" else "cuda,cpu")
            contender = ours(f"ours, {name}", repository, *options)
            servers[name] = stack.enter_context(running(contender, images[:1]))
            found.starts_s[contender.name] = [servers[name].first_answer_s]
            found.pss_mib[contender.name] = [load.pss_mib(servers[name].pid)]
        for case in CASES:
            plans = []
            for name, server in servers.items():
                request = server.request(images[: case.rows], expected[name][: case.rows])
                plans.append((server, request, load.requests_for(request, case.load, SECONDS)))
            for _ in range(times):
                for server, request, count in plans:
                    outcome = load.run(request, case.load, count, server.pid)
                    key = server.contender.name, case.name
                    found.outcomes.setdefault(key, []).append(outcome)
    shown.outcomes(found, CASES)
    figures = {
        "gpus": host.gpus(),
        "largest_logit_difference": apart,
        "outcomes": {
            f"{case}: {name}": [asdict(outcome) for outcome in outcomes]
            for (name, case), outcomes in found.outcomes.items()
        },
        "first_answer_s": found.starts_s,
    }
    measured.write("gpu", figures)


if __name__ == "__main__":
    typer.run(main)
