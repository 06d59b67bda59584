"""Say what this machine gives to training, and what of it is broken.

Every device that TensorFlow sees computes a small convolution, held against numpy.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from service import host
from service.command_line import size

NVIDIA = Path("/proc/driver/nvidia/version")
NEEDED_BYTES = 2 << 30  # data, checkpoints and exports of a run, and some room
ANSWER_S = 5.0
TOLERANCE = 1e-3  # of sums of 27 products of numbers near 1; TF32 is 1e-2 away
PACKAGES = ("train-export", "tensorflow", "keras", "numpy", "onnx", "onnxruntime", "prefect")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    found: str
    wrong: str = ""  # what is broken and what to do about it; empty where all is well


def examine(folders: list[Path], prefect_url: str) -> list[Finding]:
    """Look at everything.

    Args:
        folders: where runs and bundles are written.
        prefect_url: of the Prefect server's API; empty: a run starts one of its own.
    """
    return [
        Finding("python", platform.python_version()),
        Finding("packages", ", ".join(f"{name} {version(name)}" for name in PACKAGES)),
        processor(),
        driver(NVIDIA, tf.config.list_physical_devices("GPU")),
        *(device(one) for one in tf.config.list_logical_devices()),
        *(room(folder) for folder in folders),
        prefect(prefect_url),
    ]


def version(package: str) -> str:
    """Return an installed package's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def processor() -> Finding:
    """Say what computes, and on how many threads TensorFlow does."""
    found = host.processor()
    threads = [
        str(count) if count else "as many as cores"
        for count in (
            tf.config.threading.get_intra_op_parallelism_threads(),
            tf.config.threading.get_inter_op_parallelism_threads(),
        )
    ]
    return Finding(
        "processor",
        f"{host.cores()} of {os.cpu_count()} cores of {found.name} "
        f"({', '.join(found.kernel_flags)}); threads in an operation: {threads[0]}, "
        f"of operations: {threads[1]}",
    )


def driver(path: Path, gpus: list[tf.config.PhysicalDevice]) -> Finding:
    """Say which NVIDIA driver there is, and whether TensorFlow can use what it drives.

    Args:
        path: where the kernel tells its version.
        gpus: that TensorFlow sees.
    """
    if not path.is_file():
        return Finding("GPU driver", "none; training computes on the CPU")
    found = path.read_text().splitlines()[0].removeprefix("NVRM version: ")
    if gpus:
        return Finding("GPU driver", found)
    return Finding(
        "GPU driver",
        found,
        "there is an NVIDIA driver and TensorFlow sees no GPU; install tensorflow[and-cuda] of the "
        "same version",
    )


def device(one: tf.config.LogicalDevice) -> Finding:
    """Have a device compute a convolution and hold its answer against numpy's."""
    random = np.random.default_rng(1)
    images = random.normal(size=(2, 8, 8, 3)).astype(np.float32)
    kernels = random.normal(size=(3, 3, 3, 4)).astype(np.float32)
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        with tf.device(one.name):
            answer = tf.nn.conv2d(images, kernels, strides=1, padding="VALID")
    except tf.errors.OpError as error:
        return Finding(one.name, "", f"{one.name} cannot compute: {str(error).splitlines()[0]}")
    if not answer.device.endswith(one.name):  # TensorFlow does so without a word
        return Finding(one.name, "", f"{one.name} left its work to {answer.device}")
    apart = float(np.abs(answer.numpy() - convolved(images, kernels)).max())
    found = f"a convolution is {apart:.1e} from numpy's"
    if apart <= TOLERANCE:
        return Finding(one.name, found)
    return Finding(
        one.name, found, f"{one.name} computes wrongly: {found}, expected at most {TOLERANCE:g}"
    )


def convolved(images: NDArray[np.float32], kernels: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the valid cross-correlation, stride 1, that a convolution layer computes.

    Args:
        images: (rows, height, width, channels).
        kernels: (height, width, channels, filters).
    """
    windows = np.lib.stride_tricks.sliding_window_view(
        images.astype(np.float64), kernels.shape[:2], axis=(1, 2)
    )
    answer: NDArray[np.float64] = np.einsum(
        "bhwcij,ijcf->bhwf", windows, kernels.astype(np.float64)
    )
    return answer


def room(folder: Path) -> Finding:
    """Say how much room there is where a folder is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    found = f"{size(free)} free"
    name = f"disk of {folder}"
    if not there.is_dir():
        return Finding(name, "no folder", f"{there} is no folder; name another place")
    if not os.access(there, os.W_OK):
        return Finding(name, found, f"{there} cannot be written to; name another folder")
    if free < NEEDED_BYTES:
        return Finding(
            name, found, f"{there} has {found}, a run needs {size(NEEDED_BYTES)}; make room"
        )
    return Finding(name, found)


def prefect(url: str) -> Finding:
    """Say whether the Prefect server answers.

    Args:
        url: of its API; empty: none is configured.
    """
    if not url:
        return Finding("Prefect", "no PREFECT_API_URL; a run starts a server of its own")
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=ANSWER_S) as answer:  # noqa: S310
            if json.load(answer) is True:
                return Finding("Prefect", f"{url} answers")
        why = "it answers something else than Prefect does"
    except (OSError, ValueError) as error:
        why = str(getattr(error, "reason", error))
    return Finding(
        "Prefect",
        f"{url} does not answer",
        f"the Prefect server {url} does not answer ({why}); start it, or unset PREFECT_API_URL",
    )
