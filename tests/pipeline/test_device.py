from types import SimpleNamespace

import pytest
import tensorflow as tf

from pipeline import device
from pipeline.errors import ConfigError
from service import host


def test_the_device_is_the_cpu_unless_there_is_a_gpu():
    gpus = tf.config.list_physical_devices("GPU")

    assert (device.prepare() == "CPU") is (not gpus)


def test_products_are_not_rounded_to_ten_bits():
    device.prepare()

    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_one_device_needs_no_strategy():
    if len(tf.config.list_logical_devices("GPU")) < 2:
        assert device.strategy().num_replicas_in_sync == 1


def test_several_workers_are_refused(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", "{}")

    with pytest.raises(ConfigError, match="unset it"):
        device.strategy()


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        (("avx2", "avx512_bf16"), "mixed_bfloat16"),
        (("amx_bf16",), "mixed_bfloat16"),
        (("avx2",), None),
    ],
)
def test_a_cpu_is_faster_in_bfloat16_only_with_instructions_for_it(monkeypatch, flags, policy):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: [])
    monkeypatch.setattr(host, "processor", lambda: SimpleNamespace(flags=flags))

    assert device.mixed_policy() == policy


def test_several_gpus_are_counted_and_named(monkeypatch):
    gpus = [SimpleNamespace(name=f"GPU:{number}") for number in range(2)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda _: gpus)
    monkeypatch.setattr(tf.config.experimental, "get_memory_growth", lambda _: True)
    monkeypatch.setattr(
        tf.config.experimental,
        "get_device_details",
        lambda _: {"device_name": "A", "compute_capability": (8, 0)},
    )

    assert device.prepare() == "2 x A"
    assert device.mixed_policy() == "mixed_float16"
