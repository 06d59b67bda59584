"""A server process to be measured, and where its figures are written.

Decides nothing about what is asked of it.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from service.host import processor
from service.session import RUNTIME

RESULTS = Path(__file__).parent / "results"
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / (1 << 20)
WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is ready."""

    address: str
    pid: int

    def rss_mib(self) -> float:
        """Return the memory that it has resident now, in MiB."""
        resident_pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(resident_pages) * PAGE_MIB


@contextmanager
def server(repository: Path, *options: str) -> Iterator[Server]:
    """Serve a repository by a process of its own, which ends with this one at the latest.

    Raises:
        SystemExit: it did not start, or did not end well.
    """
    command = ["--repository", str(repository), "--address", "127.0.0.1:0", "--stop-with-stdin"]
    with subprocess.Popen(
        [sys.executable, "-m", "service", "serve", *command, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SERVE_EXPORT_LOG_FORMAT": "json"},
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("serving on "):
            raise SystemExit("error: the server did not start; its log says why")
        try:
            yield Server(line.removeprefix("serving on ").strip(), process.pid)
        finally:
            process.terminate()
            status = process.wait(WAIT_S)
    if status:
        raise SystemExit(f"error: the server ended with status {status}; its log says why")


def write(name: str, figures: Mapping[str, object]) -> None:
    """Write figures, with the machine and the versions, to benchmarks/results/NAME.json."""
    about = {
        "cpu": processor().name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            "onnxruntime": RUNTIME.rpartition(" ")[2],  # of whichever wheel, for GPUs or not
            **{name: version(name) for name in ("grpcio", "train-export")},
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**about, **figures}, indent=1) + "\n")
    print(f"written to {path}")
