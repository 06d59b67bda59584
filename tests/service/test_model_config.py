import os
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import json_format, text_format

from protos import bundle_pb2, model_config_pb2
from service import bundle, model_config
from service.errors import BundleError, InvalidRequestError
from service.model_config import VersionPolicy
from service.settings import Settings


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny").mkdir()
    return tmp_path / "tiny"


@pytest.fixture
def read(folder, options):
    """Return a function that reads a config.pbtxt of this text over the server's options."""

    def read(text, **changes):
        content = text if isinstance(text, bytes) else text.encode()
        (folder / "config.pbtxt").write_bytes(content)
        return model_config.read(folder, options(**changes))

    return read


@pytest.fixture
def refusal(read):
    def refusal(text):
        with pytest.raises(BundleError) as caught:
            read(text)
        return str(caught.value)

    return refusal


def of_server(cores=4, **settings):
    return model_config.of_server(Settings(repository=Path(), **settings), cores)


def test_model_without_a_file_is_served_as_the_server_is_set(folder, options):
    assert model_config.read(folder, options()) == options()
    assert model_config.read(folder / "absent", options()) == options()


def test_empty_file_changes_nothing(read, options):
    assert read("") == options()
    assert read('name: "tiny"\nbackend: "onnxruntime"\ndynamic_batching {}\n') == options()


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        ('name: "other"', "of the model 'other'; give it its own name"),
        ("max_batch_size: -1", "max_batch_size is -1, expected 0 or more"),
        ("instance_group [{ count: -3 }]", "an instance_group has a count below 0"),
        ("model_transaction_policy { decoupled: true }", "decoupled models are not done here"),
        ("version_policy { specific {} }", "version_policy is specific and names no version"),
    ],
)
def test_what_cannot_be_is_refused(refusal, text, trouble):
    assert refusal(text).startswith("tiny/config.pbtxt")
    assert trouble in refusal(text)


def test_order_that_asks_for_what_cannot_be_is_refused(options):
    with pytest.raises(InvalidRequestError, match="max_batch_size is -1"):
        model_config.parse_json('{"max_batch_size": -1}', options())


def test_requests_that_are_delayed_are_not_refused_for_their_wait(read):
    found = read(
        "dynamic_batching { default_queue_policy { timeout_action: DELAY"
        " default_timeout_microseconds: 1 allow_timeout_override: true max_queue_size: 3 } }",
        queue_timeout_s=1.0,
    )

    assert (found.queue_timeout_s, found.allow_timeout_override) == (0.0, False)
    assert found.max_queue_requests == 3


@pytest.mark.parametrize(("asked", "rows"), [(1, 1), (7, 7), (8, 8), (9, 8), (0, 8)])
def test_batch_may_be_smaller_than_the_servers_and_never_larger(read, asked, rows):
    assert read(f"max_batch_size: {asked}").max_batch_rows == rows


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        *[("8", 8), ("99", 99), ("100", 100), ("101", 100), ("7", 8), ("0", 100), ("-9", 100)],
        *[("many", 100), ("", 100), ("9" * 5000, 100), ("\u0663", 100)],
    ],
)
def test_queue_may_be_shorter_than_the_servers_and_never_than_a_batch(read, asked, rows):
    text = f'parameters {{ key: "max_queue_rows" value {{ string_value: "{asked}" }} }}'

    assert read(text, max_queue_rows=100).max_queue_rows == rows


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("version_policy { latest { num_versions: 3 } }", VersionPolicy(latest=3)),
        ("version_policy { latest {} }", VersionPolicy(latest=1)),
        ("version_policy { all {} }", VersionPolicy()),
        ("version_policy { specific { versions: [3, 1] } }", VersionPolicy(specific=(3, 1))),
        ("", VersionPolicy(latest=2)),
    ],
)
def test_version_policy_is_the_models_own_where_it_has_one(read, text, policy):
    assert read(text, policy=VersionPolicy(latest=2)).policy == policy


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (VersionPolicy(latest=1), [9, 3, 2, 1]),
        (VersionPolicy(), [9, 3, 2, 1]),
        (VersionPolicy(specific=(3, 7, 1)), [3, 1]),
        (VersionPolicy(specific=(7,)), []),
    ],
)
def test_policy_says_which_versions_are_tried_and_in_which_order(policy, chosen):
    assert policy.choose([1, 2, 3, 9]) == chosen


@pytest.mark.parametrize(
    ("text", "instances"),
    [
        ("instance_group [{ count: 3 }]", 3),
        ("instance_group [{ count: 3 }, { count: 2 }]", 5),
        ("instance_group [{ kind: KIND_CPU }]", 1),
        ("instance_group [{ count: 257 }]", 256),
        ("instance_group [{ count: 0 }]", 1),
    ],
)
def test_instances_are_counted_over_all_groups_and_there_is_always_one(read, text, instances):
    assert read(text, instances=1).instances == instances


def test_queue_policy_is_read(read):
    options = read(
        """
        dynamic_batching {
          max_queue_delay_microseconds: 1500
          priority_levels: 5
          default_priority_level: 2
          default_queue_policy {
            default_timeout_microseconds: 250000
            allow_timeout_override: true
            max_queue_size: 7
          }
        }
        """
    )

    assert options.max_queue_delay_s == pytest.approx(0.0015)
    assert (options.priority_levels, options.default_priority, options.levels) == (5, 2, 5)
    assert options.queue_timeout_s == pytest.approx(0.25)
    assert options.allow_timeout_override
    assert options.max_queue_requests == 7


def test_queue_policy_that_does_not_say_so_forbids_to_override_its_timeout_as_triton(read):
    policy = "dynamic_batching { default_queue_policy { max_queue_size: 7 } }"

    assert read("").allow_timeout_override
    assert not read(policy).allow_timeout_override
    assert read(policy, queue_timeout_s=3.0).queue_timeout_s == 3


def test_values_beyond_what_can_work_are_cut(read):
    largest = 2**64 - 1
    options = read(
        f"""
        dynamic_batching {{
          max_queue_delay_microseconds: {largest}
          priority_levels: {largest}
          default_priority_level: {largest}
          default_queue_policy {{ default_timeout_microseconds: {largest} }}
        }}
        """
    )

    assert options.max_queue_delay_s == 60
    assert (options.priority_levels, options.default_priority) == (64, 64)
    assert options.queue_timeout_s > 0


def test_default_priority_is_in_the_middle_where_none_is_said(read):
    assert read("dynamic_batching { priority_levels: 5 }").default_priority == 3
    assert read("dynamic_batching { priority_levels: 1 }").default_priority == 1
    assert of_server().default_priority == 1


def test_what_only_triton_knows_is_passed_over_as_its_examples_write_it(read, options):
    text = r"""
        platform: "onnxruntime_onnx"
        optimization { execution_accelerators {
          cpu_execution_accelerator : [ { name : "openvino" } ]
        } }
        parameters { key: "enable_mem_arena" value { string_value: "a [ \" b [" } }
        parameters { key: 'single [' value { string_value: '\'' } }
        # a comment [ with "quotes
        model_warmup [
          { name: "w" batch_size: 1 inputs { key: "image" value { dims: [2, 2, 1] } } }
        ]
        batch_input [{ kind: BATCH_ELEMENT_COUNT target_name: ["a", "b"] }]
        a_field_of_tomorrow { depth: [1, 2] }
        max_batch_size: 4
    """

    assert read(text) == options(max_batch_rows=4)


@pytest.mark.parametrize("text", ["a" * (1 << 20), '"' + '\\"' * (1 << 19), "a " * (1 << 19)])
def test_endless_nonsense_is_refused_soon(refusal, text):
    assert len(refusal(text[: 1 << 20])) < 300


@pytest.mark.parametrize(
    "text",
    [
        "max_batch_size: many",
        "max_batch_size: 99999999999",
        "{",
        "version_policy { latest { num_versions: -1 } }",
        b"\xff\xfe\x00",
        b"max_batch_size: 4\x00",
        "unknown " + "{ a " * 5000,
    ],
)
def test_file_that_is_no_configuration_is_refused_by_its_name(refusal, text):
    assert refusal(text).startswith("tiny/config.pbtxt is not a ModelConfig: ")


def test_file_over_the_limit_is_refused_and_one_up_to_it_is_read(read, refusal, options):
    limit = model_config.MAX_CONFIG_BYTES

    assert read("#" * limit) == options()
    assert refusal("#" * (limit + 1)) == (
        "tiny/config.pbtxt cannot be read: it has over 1048576 bytes"
    )


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_not_a_plain_file_is_refused_without_waiting_for_it(folder, options, kind):
    path = folder / "config.pbtxt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(folder / "elsewhere")

    with pytest.raises(BundleError, match=r"^tiny/config\.pbtxt cannot be read: "):
        model_config.read(folder, options())


def test_json_of_a_load_request_says_the_same_as_the_file(read, options):
    text = """
        max_batch_size: 4
        version_policy { specific { versions: [2] } }
        instance_group [{ count: 2 }]
        dynamic_batching { max_queue_delay_microseconds: 10 }
    """
    config = text_format.Parse(text, model_config_pb2.ModelConfig())

    assert model_config.parse_json(json_format.MessageToJson(config), options()) == read(text)
    assert model_config.parse_json('{"a_field_of_tomorrow": 1}', options()) == options()


@pytest.mark.parametrize(
    "text",
    ["", "{", "7", '{"max_batch_size": "many"}', '{"input": ' + "[" * 100_000, "\x00"],
)
def test_json_that_is_no_configuration_is_refused_without_repeating_it(options, text):
    with pytest.raises(InvalidRequestError) as caught:
        model_config.parse_json(text, options())

    assert str(caught.value) == (
        "the parameter 'config' is not a ModelConfig in JSON; ask ModelConfig for one"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy": VersionPolicy()},
        {"policy": VersionPolicy(latest=3)},
        {"policy": VersionPolicy(specific=(1, 3))},
        {"max_batch_rows": 3, "max_queue_rows": 17, "instances": 2},
        {"max_queue_delay_s": 0.0015, "queue_timeout_s": 0.25, "max_queue_requests": 5},
        {"priority_levels": 5, "default_priority": 2, "allow_timeout_override": False},
    ],
    ids=str,
)
def test_answer_to_model_config_put_into_the_folder_means_the_same(
    make_bundle, options, read, changes
):
    """What ModelConfig answers may be edited and used as config.pbtxt, as with Triton."""
    wanted = options(**changes)
    manifest = bundle.read_manifest(make_bundle())
    answered = model_config.message(manifest, wanted)

    again = read(text_format.MessageToString(answered))

    largest = {"max_batch_rows": 8, "max_queue_rows": options().max_queue_rows}
    assert again == wanted
    assert model_config.parse_json(
        json_format.MessageToJson(answered), replace(wanted, **largest)
    ) == (wanted)


def test_answer_to_model_config_describes_the_models_tensors_without_the_batch(
    make_bundle, make_generic_bundle, options
):
    config = model_config.message(bundle.read_manifest(make_bundle()), options())

    assert (config.name, config.platform, config.backend, config.max_batch_size) == (
        *("tiny", "onnxruntime_onnx", "onnxruntime", 8),
    )
    pb = model_config_pb2
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [
        ("image", pb.TYPE_UINT8, [2, 2, 1])
    ]
    assert [(one.name, one.data_type, list(one.dims)) for one in config.output] == [
        ("probabilities", pb.TYPE_FP32, [3]),
        ("logits", pb.TYPE_FP32, [3]),
    ]
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU
    assert config.HasField("dynamic_batching")
    assert not config.model_transaction_policy.decoupled
    line = model_config.message(bundle.read_manifest(make_generic_bundle()), options())
    assert list(line.input[0].dims) == [-1]


def test_models_on_cuda_are_said_to_be_on_a_gpu(make_bundle, options):
    manifest = bundle.read_manifest(make_bundle())
    cuda = options(providers=("CUDAExecutionProvider", "CPUExecutionProvider"))

    group = model_config.message(manifest, cuda).instance_group[0]

    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU


@pytest.mark.parametrize(
    ("cores", "settings", "instances", "threads"),
    [
        (1, {}, 1, 1),
        (2, {}, 2, 1),
        (16, {}, 4, 4),
        (3, {"instances": 2}, 2, 1),
        (2, {"instances": 8}, 8, 1),
        (16, {"threads": 5}, 4, 5),
    ],
)
def test_instances_and_threads_share_the_cores_unless_they_are_set(
    cores, settings, instances, threads
):
    options = of_server(cores, **settings)

    assert (options.instances, options.threads) == (instances, threads)


def test_settings_are_the_options_of_a_model_that_has_none_of_its_own():
    options = of_server(
        version_policy="specific:1,3",
        max_batch_rows=100,
        max_queue_rows=50,
        max_queue_delay_ms=1.5,
        queue_timeout_ms=250,
        priority_levels=4,
        providers="cuda,cpu",
    )

    assert options.policy == VersionPolicy(specific=(1, 3))
    assert (options.max_batch_rows, options.max_queue_rows) == (100, 100)
    assert options.max_queue_delay_s == pytest.approx(0.0015)
    assert options.queue_timeout_s == pytest.approx(0.25)
    assert (options.priority_levels, options.default_priority) == (4, 2)
    assert options.allow_timeout_override
    assert options.providers == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert of_server(version_policy="all").policy == VersionPolicy()
    assert of_server(version_policy="latest").policy == VersionPolicy(latest=1)
    assert of_server(version_policy="latest:3").policy == VersionPolicy(latest=3)


def test_manifest_of_no_known_datatype_never_gets_so_far(make_bundle, options):
    """A version whose tensors onnxruntime cannot have is refused before it is asked about."""
    manifest = bundle.read_manifest(make_bundle())
    assert {f"TYPE_{name}" for name in ("FP16", "FP32", "UINT8", "BOOL")} <= set(
        model_config_pb2.DataType.keys()
    )
    manifest.input.CopyFrom(bundle_pb2.TensorSpec(name="x", datatype="FP16", shape=[-1]))

    assert model_config.message(manifest, options()).input[0].data_type == (
        model_config_pb2.TYPE_FP16
    )
