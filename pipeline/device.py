"""Set TensorFlow up for this process and say what it computes on."""

import os
from typing import Any

import tensorflow as tf

from pipeline.errors import ConfigError
from service import host

BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # as Linux calls what oneDNN multiplies with
FLOAT16_CAPABILITY = (7, 0)  # of an NVIDIA GPU, from which on it computes in float16 faster


def prepare() -> str:
    """Let TensorFlow share a GPU and compute in true float32; may be called again.

    Returns:
        `CPU`, or the name of the first GPU and how many there are, as the log and the manifest
        give it.
    """
    # TF32 rounds a GPU's products to 10 bits, and the reference of every parity is float32.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        if not tf.config.experimental.get_memory_growth(gpu):
            tf.config.experimental.set_memory_growth(gpu, True)  # else it takes all of it
    if not gpus:
        return "CPU"
    name = str(_details(gpus[0]).get("device_name", gpus[0].name))
    return f"{len(gpus)} x {name}" if len(gpus) > 1 else name


def reproduce(*, xla: bool) -> None:
    """Have the same work give the same bits: from both engines, and on a GPU every time.

    Args:
        xla: the GPU's kernels are XLA's, which cannot promise it.
    """
    # It joins the constants of a formula as the graph around it allows: the last bit of a rate on
    # a schedule then depends on who built the graph.
    tf.config.optimizer.set_experimental_options({"constant_folding": False})
    if tf.config.list_physical_devices("GPU") and not xla:
        tf.config.experimental.enable_op_determinism()


def strategy() -> tf.distribute.Strategy:
    """Return how training is spread: over all GPUs of this machine if there are several.

    Raises:
        ConfigError: this process is one of several workers.
    """
    if os.environ.get("TF_CONFIG"):
        raise ConfigError(
            "TF_CONFIG is set, for training with several workers, which Keras 3 cannot do on "
            "TensorFlow (its fit fails with two); unset it: several GPUs of one machine are used "
            "without it"
        )
    gpus = tf.config.list_logical_devices("GPU")
    return mirrored([gpu.name for gpu in gpus]) if len(gpus) > 1 else tf.distribute.get_strategy()


def mirrored(devices: list[str]) -> tf.distribute.Strategy:
    """Return a strategy that gives each device a part of every batch."""
    return tf.distribute.MirroredStrategy(devices)


def mixed_policy() -> str | None:
    """Return the Keras policy of 16 bits that is faster here; None: float32 is.

    float16 on a GPU; bfloat16, which has float32's range, on a CPU with instructions for it.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capable = _details(gpus[0]).get("compute_capability", (0, 0)) >= FLOAT16_CAPABILITY
        return "mixed_float16" if capable else None
    return "mixed_bfloat16" if BFLOAT16_FLAGS & set(host.processor().flags) else None


def _details(gpu: tf.config.PhysicalDevice) -> dict[str, Any]:
    return dict(tf.config.experimental.get_device_details(gpu))
