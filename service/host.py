"""What this host gives to the process: cores, memory, and what its processor can do.

Read from Linux' own files; what follows from it is decided elsewhere. Limits are those of cgroups
v2 and v1, of the process's own group and of every one above it.
"""

import ctypes
import math
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

from service.errors import SettingsError

ROOT = Path("/")
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h
HEAPS = 2
# Features by which onnxruntime chooses its kernels, by the kernel's names: of x86, then of ARM.
KERNEL_FLAGS = (
    *("sse4_1", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)
LARGE_BYTES = 1 << 16  # from here on a block is the system's, and goes back to it when it is freed
NO_LIMIT_BYTES = 1 << 60  # v1 writes a number near 2^63 where there is none
Started = TypeVar("Started")


class Processor(NamedTuple):
    """Its name as the kernel gives it, and its features by the kernel's names."""

    name: str
    flags: frozenset[str]

    @property
    def kernel_flags(self) -> tuple[str, ...]:
        """Those by which onnxruntime's kernels, and so its rounding, may differ."""
        return tuple(flag for flag in KERNEL_FLAGS if flag in self.flags)


def gpus(root: Path = ROOT) -> list[str]:
    """Return the names of NVIDIA's devices, as their driver tells them; none without it."""
    lines: list[str] = []
    with suppress(OSError):  # a name is not worth a refusal
        for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
            lines += path.read_text().splitlines()
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]


def cores(root: Path = ROOT) -> int:
    """Return how many cores are worth using: the affinity, cut to the quota rounded up."""
    limit = quota(root)
    return affinity() if limit is None else max(1, min(affinity(), math.ceil(limit)))


def affinity() -> int:
    """Return on how many cores this process may be put."""
    return len(cpus()) or os.cpu_count() or 1


def cpus() -> set[int]:
    """Return the processors that this process may be put on; none where nothing keeps it to any."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else set()


def started_on(numbers: Collection[int], start: Callable[[], Started]) -> Started:
    """Call something that starts threads, and have these keep to some of `cpus`; none: to all.

    It is called by a thread that keeps to them and then ends, so nobody else is kept anywhere.

    Raises:
        SettingsError: the system does not let a thread keep to them.
    """
    if not numbers:
        return start()

    def keep_and_start() -> Started:
        try:
            os.sched_setaffinity(0, numbers)
        except OSError as error:
            raise SettingsError(
                f"io_cpus lists {shown(numbers)}, which the system refuses: {error.strerror}; "
                "name others, or none"
            ) from error
        return start()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(keep_and_start).result()


def let_go(numbers: set[int]) -> None:
    """Let this thread be put on `cpus`, if who started it was kept to less."""
    if numbers and os.sched_getaffinity(0) < numbers:
        with suppress(OSError):  # they are the process's no longer
            os.sched_setaffinity(0, numbers)


def shown(numbers: Collection[int]) -> str:
    """Return processors as a list such as `0,2-3`."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def quota(root: Path = ROOT) -> float | None:
    """Return how many cores' time the cgroups allow, None if they set no limit."""
    found = []
    for group in _groups("cpu", root):
        limit, period = _numbers(group / "cpu.max", 2)
        if limit is None:
            limit, period = (
                _numbers(group / f"cpu.cfs_{one}_us", 1)[0] for one in ("quota", "period")
            )
        if limit is not None and period and limit > 0:  # v1 writes -1 for none
            found.append(limit / period)
    return min(found, default=None)


def memory_limit_bytes(root: Path = ROOT) -> int | None:
    """Return how much memory the cgroups allow, None if they set no limit."""
    found = [
        limit
        for group in _groups("memory", root)
        for name in ("memory.max", "memory.limit_in_bytes")
        for limit in _numbers(group / name, 1)
        if limit is not None and limit < NO_LIMIT_BYTES
    ]
    return min(found, default=None)


def memory_bytes(root: Path = ROOT) -> int | None:
    """Return how much memory the machine has, None if it does not tell."""
    return _meminfo("MemTotal:", root)


def available_bytes(root: Path = ROOT) -> int | None:
    """Return how much memory is free for the asking, None if the machine does not tell."""
    return _meminfo("MemAvailable:", root)


def processor(root: Path = ROOT) -> Processor:
    """Return the first processor's name and features; all are alike on the hosts we know."""
    about: dict[str, str] = {}
    for line in _lines(root / "proc" / "cpuinfo"):
        key, _, value = line.partition(":")
        about.setdefault(key.strip(), value.strip())
    flags = about.get("flags") or about.get("Features", "")  # x86, or ARM
    return Processor(about.get("model name") or platform.machine(), frozenset(flags.split()))


def _meminfo(name: str, root: Path) -> int | None:
    for line in _lines(root / "proc" / "meminfo"):
        if line.startswith(name):
            return int(line.split()[1]) << 10
    return None


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's cgroups, and of those above them, that may set limits."""
    mount = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mount / controller if controllers else mount
        inside = PurePosixPath(path.lstrip("/"))
        if ".." not in inside.parts:  # a group outside of what this container sees
            yield from (top / group for group in (inside, *inside.parents) if group.parts)
        yield top


def _numbers(path: Path, count: int) -> list[int | None]:
    """Return a file's numbers, each None where it has none, or says `max`."""
    words = [*" ".join(_lines(path)).split(), *[""] * count][:count]
    return [int(word) if word.lstrip("-").isdecimal() else None for word in words]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []


def keep_memory_steady() -> bool:
    """Have the allocator keep little for later; before there are threads.

    glibc gives every thread a heap of its own, and after the first large block that is freed keeps
    blocks of that size as well. Under messages of all sizes both grow for hours.

    Returns:
        Whether the allocator could be told: glibc's could.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None)
    if tell is None:
        return False
    return bool(tell(M_ARENA_MAX, HEAPS) and tell(M_MMAP_THRESHOLD, LARGE_BYTES))


def give_back_memory() -> bool:
    """Let the allocator return to the system what it keeps for later; blocks for milliseconds.

    glibc keeps what was freed between blocks in use. With messages of all sizes that grows for
    hours, and is memory that nobody has.

    Returns:
        Whether the allocator knows how: glibc's does.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True
