"""Set TensorFlow up for this process and say what it computes on."""

import tensorflow as tf


def prepare() -> str:
    """Let TensorFlow share a GPU and compute in true float32; may be called again.

    Returns:
        `CPU`, or the name of the first GPU, as the log and the manifest give it.
    """
    # TF32 rounds a GPU's products to 10 bits, and the reference of every parity is float32.
    tf.config.experimental.enable_tensor_float_32_execution(False)
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        if not tf.config.experimental.get_memory_growth(gpu):
            tf.config.experimental.set_memory_growth(gpu, True)  # else it takes all of it
    if not gpus:
        return "CPU"
    details = tf.config.experimental.get_device_details(gpus[0])
    return str(details.get("device_name", gpus[0].name))
