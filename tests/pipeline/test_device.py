import tensorflow as tf

from pipeline import device


def test_the_device_is_the_cpu_unless_there_is_a_gpu():
    gpus = tf.config.list_physical_devices("GPU")

    assert (device.prepare() == "CPU") is (not gpus)


def test_products_are_not_rounded_to_ten_bits():
    device.prepare()

    assert not tf.config.experimental.tensor_float_32_execution_enabled()
