"""Serve a staged bundle for real and hold what comes over gRPC against the original model.

The server is the one that users run, as a process of its own on a free port, asked for the whole
test set. What it answers must also be what the file it loaded answered without it.
"""

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import json_format
from numpy.typing import NDArray

from pipeline import dataset, files
from pipeline.errors import ParityError, PublishError
from pipeline.records import Checked, Dataset, Staged
from protos import bundle_pb2
from service import agreement, bundle
from service.client import Client
from service.errors import ServiceError
from service.session import RUNTIME

log = logging.getLogger(__name__)
START_S = 60.0  # a second on two cores; a loaded machine may take its time
STOP_S = 30.0
BATCH_ROWS = 256
# Served and unserved run the same code on the same batches: more than rounding is a mistake.
SAME_LOGIT = 1e-6
ANNOUNCEMENT = "serving on "


def ask(staged: Staged, checked: Checked, data: Dataset, folder: Path) -> Path:
    """Start the server on the staged bundle, ask for every test row, stop it, judge.

    Args:
        staged: the bundle to serve.
        checked: the reference's answers, and the file's own.
        data: its test rows.
        folder: for the report.

    Returns:
        The served parity, a ParityReport as JSON.

    Raises:
        PublishError: the server does not start, does not answer, or does not stop cleanly.
        ParityError: its answers are over the budget, or not those of the file it loaded.
    """
    test = dataset.load(data).test
    with np.load(checked.answers, allow_pickle=False) as answers:
        reference, unserved = answers["reference"], answers[checked.served_variant]
    with server(staged.repository) as address:
        log.info("asking the server on %s for %d rows", address, len(test.inputs))
        logits, seconds = _predict(address, staged, test.inputs)
    report = agreement.compare_by_kind(
        reference,
        logits,
        test.targets,
        allowed=agreement.Budget(checked.precision, checked.scale),
        class_names=list(data.labels),
    )
    report.variant, report.runtime, report.path = "served", RUNTIME, bundle.MODEL
    report.size_bytes = (staged.path / bundle.MODEL).stat().st_size
    report.images_per_second, report.batch_rows = len(logits) / seconds, BATCH_ROWS
    path = folder / "served.json"
    text = json_format.MessageToJson(report, preserving_proto_field_name=True)
    files.write_whole(path, text.encode())
    # Outputs that are no logits may be so large that float32 has no smaller steps.
    limit = SAME_LOGIT * (1.0 if data.classifies else max(1.0, checked.scale))
    _judge(report, agreement.difference(unserved, logits).max, limit)
    return path


def _predict(address: str, staged: Staged, rows: NDArray[Any]) -> tuple[NDArray[np.float32], float]:
    """Return the logits, or other outputs, of every row, and the seconds it took once connected."""
    name, number = staged.path.parent.name, staged.path.name
    output = bundle.checked_output(bundle.read_manifest(staged.path))
    try:
        with Client(address) as client:
            client.wait_ready(START_S)
            client.predict(rows[:BATCH_ROWS], model=name, version=number)
            started_s = time.monotonic()
            answer = client.predict(rows, model=name, version=number)
            seconds = time.monotonic() - started_s
    except ServiceError as error:
        raise PublishError(f"the staged bundle was not served: {error}") from error
    return answer.outputs[output].astype(np.float32, copy=False), seconds


def _judge(report: bundle_pb2.ParityReport, apart: float, limit: float) -> None:
    """Refuse what is over its budget, or `apart` from what the file answered without a server."""
    if not report.passed:
        raise ParityError(f"nothing is published, as served: {report.failure}")
    if not apart <= limit:
        raise ParityError(
            f"nothing is published: the server's logits are {apart:.3g} from those of the file "
            f"it loaded, expected at most {limit:.3g}"
        )
    log.info(
        "served: max |Δlogit| %.2g, agreement %.2f %%: passed",
        report.logits.max,
        100 * report.agreement,
    )


@contextmanager
def server(repository: Path) -> Iterator[str]:
    """Run `serve-export serve` until the block ends; give its address once it serves."""
    command = (
        sys.executable, "-m", "service", "serve",
        "--repository", str(repository), "--address", "127.0.0.1:0", "--stop-with-stdin",
        "--model-control", "none",
    )  # fmt: skip
    with subprocess.Popen(  # noqa: S603  our own module
        command,
        stdin=subprocess.PIPE,  # closed by our death, however sudden: the server then stops too
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        log_lines: list[str] = []
        reader = threading.Thread(target=_drain, args=(process.stderr, log_lines), daemon=True)
        reader.start()
        watchdog = threading.Timer(START_S, process.kill)
        watchdog.start()
        try:
            announced = process.stdout.readline().strip() if process.stdout else ""
            watchdog.cancel()
            if not announced.startswith(ANNOUNCEMENT):
                process.wait()
                reader.join()
                raise PublishError(f"the server did not start: {(log_lines or ['no message'])[-1]}")
            yield announced.removeprefix(ANNOUNCEMENT)
            process.terminate()
            status = process.wait(STOP_S)
            if status:
                raise PublishError(f"the server stopped with status {status}, expected 0")
        except subprocess.TimeoutExpired as error:
            raise PublishError(f"the server did not stop within {STOP_S:g} s") from error
        finally:
            watchdog.cancel()
            process.kill()


def _drain(stream: Iterator[str], lines: list[str]) -> None:
    lines.extend(line.strip() for line in stream if line.strip())
