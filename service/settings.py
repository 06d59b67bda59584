"""The one list of the server's options; command line, environment and help are made from it."""

from dataclasses import dataclass, field
from pathlib import Path

from service.errors import SettingsError

LIMITS = {
    "max_batch_rows": (1, 1 << 20),  # each of them is kept in memory once it was warmed
    "threads": (0, 256),  # more than any one call of a model has work for
    "drain_s": (0, 86_400),
}
ENVIRONMENT_PREFIX = "SERVE_EXPORT_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one server runs.

    Raises:
        SettingsError: a number is out of its range.
    """

    repository: Path = field(metadata={"help": "Folder of NAME/VERSION bundles."})
    address: str = field(
        default="127.0.0.1:8001",
        metadata={"help": "HOST:PORT to listen on; port 0 takes a free one."},
    )
    max_batch_rows: int = field(
        default=256,  # as many as the parity of a variant is measured with in one call
        metadata={"help": "Most images one request may hold."},
    )
    threads: int = field(
        default=0,
        metadata={"help": "onnxruntime's threads in one model call; 0: this host's cores."},
    )
    drain_s: float = field(
        default=30.0,  # what Triton waits; Kubernetes' own grace period is as long
        metadata={"help": "Longest wait, in seconds, for calls in flight when stopping."},
    )
    stop_with_stdin: bool = field(
        default=False,
        metadata={"help": "Stop when standard input is closed, as by the end of the parent."},
    )

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is opened."""
        for name, (smallest, largest) in LIMITS.items():
            value = getattr(self, name)
            if not smallest <= value <= largest:  # so that nan is refused as well
                raise SettingsError(f"{name} is {value}, expected {smallest} to {largest}")
