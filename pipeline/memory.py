"""Whether data are small enough to be learnt from on this machine; everything is held in memory."""

from pipeline.errors import DatasetError
from service import host

SHARE = 4  # training holds the rows up to three times: as read, as a constant, in batches
UNKNOWN_BYTES = 8 << 30  # where the machine does not tell


def most_bytes() -> int:
    """Return how large one array may be: a quarter of what this process may have."""
    known = [size for size in (host.memory_bytes(), host.memory_limit_bytes()) if size]
    return min(known, default=UNKNOWN_BYTES) // SHARE


def check(name: str, size_bytes: int) -> None:
    """Refuse an array before it is made.

    Raises:
        DatasetError: it is larger than `most_bytes`.
    """
    most = most_bytes()
    if size_bytes > most:
        raise DatasetError(
            f"{name} has {size_bytes / 1e9:,.1f} GB of values, at most {most / 1e9:,.1f} GB can be "
            "learnt from on this machine; give fewer rows or smaller ones"
        )
