"""The one list of the server's options; command line, environment and help are made from it."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from service.errors import SettingsError

LIMITS = {
    "poll_s": (0.05, 86_400),
    "workers": (1, 256),
    "io_threads": (1, 64),
    "max_batch_rows": (1, 1 << 20),  # each of them is kept in memory once it was warmed
    "max_queue_rows": (1, 1 << 24),
    "max_queue_delay_ms": (0, 60_000),
    "queue_timeout_ms": (0, 86_400_000),
    "priority_levels": (0, 64),
    "instances": (0, 256),
    "threads": (0, 256),  # more than any one call of a model has work for
    "max_message_mib": (1, 2047),  # gRPC counts the bytes in 32 bits
    "max_image_pixels": (1, 1 << 28),
    "max_connection_age_s": (0, 86_400),
    "sample_rate": (0, 1),
    "sample_rows": (1, 1 << 20),
    "live_window_s": (1, 86_400),
    "pre_drain_s": (0, 86_400),
    "drain_s": (0, 86_400),
}
CHOICES = {
    "model_control": ("poll", "explicit", "none"),
    "log_format": ("console", "json"),
    "front": ("auto", "native", "grpcio"),
}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CPU_RANGE = re.compile(r"([0-9]+)-([0-9]+)")
CPUS = re.compile(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*|")
VERSION_POLICY = re.compile(r"all|latest(:[1-9][0-9]{0,3})?|specific:[1-9][0-9]*(,[1-9][0-9]*)*")
ENVIRONMENT_PREFIX = "SERVE_EXPORT_"


def place(text: str) -> Path | str:
    """Return where a repository is: a folder of this host, or a URL as it was given."""
    return text if "://" in text else Path(text)


def _option(default: object, group: str, text: str) -> Any:  # noqa: ANN401  as field itself
    """Declare one option; its help says what the value means, and its unit."""
    return field(default=default, metadata={"group": group, "help": text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one server runs.

    Raises:
        SettingsError: a value cannot work.
    """

    repository: Path | str = field(
        metadata={
            "group": "Models",
            "help": "Folder of NAME/VERSION bundles; or where one is copied from: "
            "s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, file:///FOLDER.",
        }
    )
    cache: Path | None = _option(
        None,
        "Models",
        "Folder for the copies of a repository behind a URL; by default in the user's cache.",
    )
    model_control: str = _option(
        "poll",
        "Models",
        "poll: watch the folder for new versions; explicit: load and unload when told over gRPC; "
        "none: load once.",
    )
    poll_s: float = _option(
        5.0,
        "Models",
        "Seconds between two looks at the folder, besides its file system's events, or at the URL.",
    )
    version_policy: str = _option(
        "latest:1",  # as Triton
        "Models",
        "Which versions are served: latest:N, all, or specific:1,3; a model's config.pbtxt wins. "
        "Aliased versions always are.",
    )
    providers: str = _option(
        "cpu", "Models", "onnxruntime's execution providers, best first: cpu, or cuda,cpu."
    )

    address: str = _option(
        "127.0.0.1:8001", "Network", "HOST:PORT to listen on; port 0 takes a free one."
    )
    metrics_address: str = _option("", "Network", "HOST:PORT of Prometheus' /metrics; empty: none.")
    front: str = _option(
        "auto",
        "Network",
        "native: HTTP/2 in Rust, several times as fast, for clients that are trusted; grpcio: for "
        "any, with TLS; auto: native on a loopback address or behind a proxy, else grpcio.",
    )
    behind_proxy: bool = _option(
        False,
        "Network",
        "Clients reach this address only through a proxy that bounds what they send; "
        "auto then takes the native front.",
    )
    workers: int = _option(1, "Network", "Processes that share the address, each with its models.")
    io_threads: int = _option(
        1,
        "Network",
        "Threads of the native front that read and write. With 2, answers of one connection leave "
        "together, which is worth it on two cores that are busy with many requests at a time; on 4 "
        "cores and more it costs (docs/serving.md says how to measure it).",
    )
    io_cpus: str = _option(
        "",
        "Network",
        "CPUs that those threads keep to, a list such as 0 or 0,2-3; empty: any. Several threads "
        "on one CPU write less often; a lone client's short answers are computed there.",
    )
    max_message_mib: int = _option(
        64,  # gRPC's own 4 MiB stops a batch of 1,400 colour images of 32 x 32 in float32
        "Network",
        "Largest request and answer, in MiB.",
    )
    max_connection_age_s: float = _option(
        0.0, "Network", "Seconds after which a client must connect anew, for balancing; 0: never."
    )
    server_name: str = _option(
        "train-export", "Network", "Name that ServerMetadata answers, for clients that ask for one."
    )

    max_batch_rows: int = _option(
        256,  # as many as the parity of a variant is measured with in one call
        "Batching",
        "Most images in one request, and joined into one call of the model.",
    )
    max_queue_rows: int = _option(
        4096,  # a full queue of the largest requests keeps every instance busy for eight calls
        "Batching",
        "Most images that may wait; more are refused with UNAVAILABLE.",
    )
    max_queue_delay_ms: float = _option(
        0.0, "Batching", "Longest wait for more images while nothing runs; 0: never wait."
    )
    queue_timeout_ms: float = _option(
        0.0, "Batching", "Longest wait in the queue; 0: as long as the caller waits."
    )
    priority_levels: int = _option(
        0, "Batching", "Levels of priority a request may ask for, 1 first; 0: none."
    )
    instances: int = _option(
        0, "Batching", "Calls of one model at a time; 0: as many as cores, at most 4."
    )
    threads: int = _option(
        0, "Batching", "onnxruntime's threads in one call; 0: the cores, divided by instances."
    )
    max_image_pixels: int = _option(
        16_000_000,  # 48 MB once decoded as RGB
        "Batching",
        "Most pixels, all pictures together, in one request of PNG or JPEG.",
    )

    sample_rate: float = _option(
        0.0,  # what users send is theirs
        "Parity",
        "Share of answered rows, 0 to 1, that shadows may read; 0: no row leaves the server.",
    )
    sample_rows: int = _option(
        4096,
        "Parity",
        "Most sampled rows kept for one shadow that is slow; older ones are dropped.",
    )
    live_window_s: float = _option(
        300.0, "Parity", "Seconds that the live verdict looks back over what shadows have reported."
    )

    token_file: Path | None = _option(
        None, "Security", "File of tokens, one a line; a call then needs one of them."
    )
    admin_token_file: Path | None = _option(
        None, "Security", "File of tokens that may load and unload models; without it nobody may."
    )
    tls_cert: Path | None = _option(None, "Security", "Certificate chain, PEM; needs --tls-key.")
    tls_key: Path | None = _option(None, "Security", "Its private key, PEM.")
    tls_client_ca: Path | None = _option(
        None, "Security", "Authority that clients' certificates must come from, PEM."
    )

    log_format: str = _option("console", "Operation", "console, or json: one object a line.")
    access_log: bool = _option(False, "Operation", "Log every call with its status and time.")
    pre_drain_s: float = _option(
        0.0,
        "Operation",
        "Seconds from SIGTERM, with health NOT_SERVING, until calls are refused; "
        "as long as balancers take to notice.",
    )
    drain_s: float = _option(
        30.0,  # what Triton waits; Kubernetes' own grace period is as long
        "Operation",
        "Longest wait, in seconds, for calls in flight when stopping.",
    )
    stop_with_stdin: bool = _option(
        False, "Operation", "Stop when standard input is closed, as by the end of the parent."
    )

    @property
    def folder(self) -> Path:
        """The repository on this host; `service.mirror` keeps one for a URL."""
        return Path(self.repository)

    @property
    def io_cpu_numbers(self) -> frozenset[int]:
        """The processors that `io_cpus` lists; none: any."""
        ranges = (part.partition("-") for part in self.io_cpus.split(",") if part)
        return frozenset(
            number
            for first, _, last in ranges
            for number in range(int(first), int(last or first) + 1)
        )

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is opened."""
        self._check_numbers()
        self._check_words()
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("tls_cert and tls_key need each other; give both or neither")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise SettingsError("tls_client_ca needs tls_cert and tls_key")

    def environment(self) -> dict[str, str]:
        """Return the variables that make these settings in another process."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {
            f"{ENVIRONMENT_PREFIX}{name.upper()}": str(value)
            for name, value in values.items()
            if value is not None
        }

    def _check_numbers(self) -> None:
        for name, (smallest, largest) in LIMITS.items():
            value = getattr(self, name)
            if not smallest <= value <= largest:  # so that nan is refused as well
                raise SettingsError(f"{name} is {value}, expected {smallest} to {largest}")

    def _check_words(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingsError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}"
                )
        ranges = CPU_RANGE.findall(self.io_cpus)
        if not CPUS.fullmatch(self.io_cpus) or any(int(a) > int(b) for a, b in ranges):
            raise SettingsError(f"io_cpus is {self.io_cpus!r}, expected a list such as 0 or 0,2-3")
        if not VERSION_POLICY.fullmatch(self.version_policy):
            raise SettingsError(
                f"version_policy is {self.version_policy!r}, "
                "expected all, latest:N or specific:N,N,…"
            )
        unknown = set(self.providers.split(",")) - PROVIDERS.keys()
        if unknown:
            raise SettingsError(
                f"providers is {self.providers!r}, expected {' and '.join(PROVIDERS)}, by commas"
            )
