import json
import logging
import shutil
import threading
from importlib.metadata import version as package_version
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import inference_pb2, model_config_pb2, parity_pb2
from service import errors, version
from service.call import CallError, Status
from service.model_config import VersionPolicy
from service.rpc import (
    INFER,
    NOT_DONE,
    SAMPLE,
    STREAM,
    WATCH,
    Rpc,
    stream_answer,
    stream_refusal,
)

INFERENCE = "/inference.GRPCInferenceService/"
PARITY = "/train_export.v1.ParityService/GetParity"
REPORT = "/train_export.v1.ParityService/ReportShadow"
ANSWERED = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)
SAID_NOT_TO_BE_DONE = (
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
)
PATHS = [*(INFERENCE + name for name in ANSWERED), PARITY, REPORT]
POLLING = (
    "explicit model load / unload is not allowed if polling is enabled; "
    "start the server with --model-control explicit"
)


@pytest.fixture
def begin(asked):
    """Return a function that begins a call on an Rpc: begin(rpc, method, message or bytes)."""

    def begin(rpc, method, request=None):
        path = method if method.startswith("/") else INFERENCE + method
        content = (
            request
            if isinstance(request, bytes)
            else (request or message(path)).SerializeToString()
        )
        call = asked(path, content)
        rpc.begin(call)
        return call

    return begin


def message(path, kind="Request", **fields):
    module: Any = parity_pb2 if path in {PARITY, REPORT} else inference_pb2
    return getattr(module, path.rpartition("/")[2] + kind)(**fields)


@pytest.fixture
def say(begin):
    """Return a function that asks an Rpc and gives its answer; fields make the request."""

    def say(rpc, method, request=None, **fields):
        call = begin(rpc, method, request or message(method, **fields))
        return message(method, "Response").FromString(call.result())

    return say


@pytest.fixture
def refused(say):
    """Return a function that asks an Rpc and gives the name and text of its refusal."""

    def refused(rpc, method, request=None, **fields):
        with pytest.raises(CallError) as caught:
            say(rpc, method, request, **fields)
        return caught.value.status.name, str(caught.value)

    return refused


@pytest.fixture
def rpc_on():
    """Return a function that makes an Rpc on a repository, real or not."""
    made = []

    def rpc_on(repository: Any, **options) -> Rpc:
        made.append(Rpc(repository, **options))
        return made[-1]

    yield rpc_on
    for rpc in made:
        rpc.close()


@pytest.fixture
def partly(make_bundle, open_repository, rpc_on):
    """An Rpc on tiny 1 and 3, a refused tiny 2, and a model with no good version."""
    for name, number in (("tiny", 2), ("broken", 1)):
        make_bundle(name=name, version=number).joinpath("model.onnx").unlink()
    make_bundle(version=3)
    return rpc_on(open_repository(make_bundle().parents[1], policy=VersionPolicy()))


@pytest.fixture
def controlled(make_bundle, open_repository, rpc_on):
    """An Rpc that loads on request; it has tiny 1 and a broken model on the disk, none loaded."""
    make_bundle(name="broken").joinpath("model.onnx").unlink()
    repository = open_repository(make_bundle().parents[1], look=False)
    repository.wait_for_orders()
    return rpc_on(repository, control=True)


class Broken:
    """A repository whose every method raises the same."""

    def __init__(self, error):
        self._error = error

    def __getattr__(self, name):
        raise self._error


def test_every_rpc_of_the_protocol_is_answered_or_said_not_to_be_done(rpc):
    services = [
        inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        parity_pb2.DESCRIPTOR.services_by_name["ParityService"],
    ]
    described = {
        f"/{service.full_name}/{method.name}" for service in services for method in service.methods
    }

    assert described == {*PATHS, STREAM, SAMPLE, WATCH}
    assert set(rpc.streaming) == {SAMPLE, WATCH}
    assert set(NOT_DONE) == {INFERENCE + name for name in SAID_NOT_TO_BE_DONE}
    assert sorted(rpc.paths) == sorted([*PATHS, *NOT_DONE])
    assert rpc.streamed == INFER


@pytest.mark.parametrize("method", SAID_NOT_TO_BE_DONE)
@pytest.mark.parametrize("content", [b"", b"\x0a\x01a", b"\xff"])
def test_rpc_that_is_not_done_says_so_in_a_sentence(rpc, begin, method, content):
    with pytest.raises(CallError) as caught:
        begin(rpc, method, content).result()

    assert caught.value.status is Status.UNIMPLEMENTED
    assert len(str(caught.value).split()) > 5


def test_server_is_ready_only_when_every_model_has_a_version_that_answers(partly, say):
    assert say(partly, "ServerLive").live
    assert not say(partly, "ServerReady").ready


def test_server_is_live_and_ready_and_says_what_it_is(rpc, say):
    assert say(rpc, "ServerLive").live
    assert say(rpc, "ServerReady").ready
    about = say(rpc, "ServerMetadata")
    assert (about.name, about.version) == ("train-export", package_version("train-export"))
    assert about.extensions == [
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "model_repository",
        "parameters",
        "schedule_policy",
        "statistics",
    ]


def test_server_says_the_name_it_was_given_and_what_explicit_control_adds(repository, rpc_on, say):
    about = say(rpc_on(repository, server_name="triton", control=True), "ServerMetadata")

    assert about.name == "triton"
    assert "model_repository(unload_dependents)" in about.extensions
    assert list(about.extensions) == sorted(about.extensions)


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("tiny", "", True),
        ("tiny", "3", True),
        ("tiny", "2", False),
        ("tiny", "4", False),
        ("broken", "", False),
        ("none", "", False),
        ("", "", False),
    ],
)
def test_model_readiness_is_an_answer_and_not_an_error(partly, say, name, version, ready):
    assert say(partly, "ModelReady", name=name, version=version).ready is ready


NAMING = ("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics")


@pytest.mark.parametrize("method", NAMING)
@pytest.mark.parametrize("number", ["x", "-1", "1.0", "Ⅷ", "9" * 19, "champion"])
def test_version_that_is_no_number_is_refused(partly, refused, method, number):
    status, text = refused(partly, method, name="tiny", version=number)

    assert status == "INVALID_ARGUMENT"
    assert text == (
        f"failed to get model version from specified version string '{number}'; "
        "expected a whole number, or an alias"
    )


@pytest.mark.parametrize("method", NAMING[1:])
@pytest.mark.parametrize(
    ("name", "number", "status", "text"),
    [
        ("none", "", "NOT_FOUND", "'none' is not found"),
        ("none", "1", "NOT_FOUND", "'none' is not found"),
        ("tiny", "4", "NOT_FOUND", "'tiny' version 4 is not found"),
        ("tiny", "2", "UNAVAILABLE", "'tiny' version 2 is not at ready state"),
        ("broken", "", "UNAVAILABLE", "'broken' has no available versions"),
    ],
)
def test_model_that_is_not_served_is_refused(partly, refused, method, name, number, status, text):
    assert refused(partly, method, name=name, version=number) == (
        status,
        f"Request for unknown model: {text}",
    )


@pytest.mark.parametrize("method", NAMING)
def test_alias_names_a_version(make_bundle, open_repository, rpc_on, say, method):
    make_bundle(version=2)
    folder = make_bundle().parent
    (folder / "aliases.json").write_text('{"champion": 1}')
    rpc = rpc_on(open_repository(folder.parent, policy=VersionPolicy()))

    assert say(rpc, method, name="tiny", version="champion") == say(
        rpc, method, name="tiny", version="1"
    )


def test_metadata_names_tensors_versions_and_properties(partly, say):
    about = say(partly, "ModelMetadata", name="tiny")

    assert (about.name, about.versions, about.platform) == ("tiny", ["1", "3"], "onnxruntime_onnx")
    tensors = inference_pb2.ModelMetadataResponse.TensorMetadata
    assert list(about.inputs) == [tensors(name="image", datatype="UINT8", shape=[-1, 2, 2, 1])]
    assert list(about.outputs) == [
        tensors(name="probabilities", datatype="FP32", shape=[-1, 3]),
        tensors(name="logits", datatype="FP32", shape=[-1, 3]),
    ]
    assert json.loads(about.properties["labels"]) == ["dark", "light", "striped"]
    assert about.properties["max_batch_rows"] == "8"
    assert len(about.properties["model.sha256"]) == 64
    assert float(about.properties["parity.max_logit_budget"]) > 0


@pytest.mark.parametrize("name", ["tiny", "line"])
def test_configuration_and_metadata_agree_as_perf_analyzer_wants_them_to(
    make_bundle, make_generic_bundle, open_repository, rpc_on, say, name
):
    make_generic_bundle()
    rpc = rpc_on(open_repository(make_bundle().parents[1], max_queue_delay_s=0.002, instances=2))

    about = say(rpc, "ModelMetadata", name=name)
    config = say(rpc, "ModelConfig", name=name).config

    assert (config.name, config.platform) == (about.name, about.platform)
    assert config.backend == "onnxruntime"
    assert str(config.max_batch_size) == about.properties["max_batch_rows"] == "8"
    for described, configured in ((about.inputs, config.input), (about.outputs, config.output)):
        assert len(described) == len(configured)
        for tensor, one in zip(described, configured, strict=True):
            assert tensor.shape[0] == -1
            assert (tensor.name, list(tensor.shape[1:])) == (one.name, list(one.dims))
            assert f"TYPE_{tensor.datatype}" == model_config_pb2.DataType.Name(one.data_type)
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert not config.model_transaction_policy.decoupled
    assert [group.count for group in config.instance_group] == [2]


def test_statistics_count_rows_requests_and_failures(rpc, say, refused, infer, tiny):
    say(rpc, "ModelInfer", infer(tiny.images(3)))
    say(rpc, "ModelInfer", infer(tiny.images(5)))
    refused(rpc, "ModelInfer", infer(tiny.images(9)))

    (found,) = say(rpc, "ModelStatistics", name="tiny").model_stats

    assert (found.name, found.version) == ("tiny", "1")
    assert (found.inference_count, found.execution_count) == (8, 2)
    assert (found.inference_stats.success.count, found.inference_stats.fail.count) == (2, 1)
    assert sorted(batch.batch_size for batch in found.batch_stats) == [3, 5]
    assert say(rpc, "ModelStatistics").model_stats == [found]


def test_statistics_of_no_named_model_are_those_of_every_version_that_is_ready(partly, say):
    found = say(partly, "ModelStatistics").model_stats

    assert [(one.name, one.version) for one in found] == [("tiny", "1"), ("tiny", "3")]
    found = say(partly, "ModelStatistics", name="tiny", version="3").model_stats
    assert [(one.name, one.version) for one in found] == [("tiny", "3")]


def index(say, rpc, **fields):
    models = say(rpc, "RepositoryIndex", **fields).models
    return [(model.name, model.version, model.state, model.reason) for model in models]


def test_index_lists_what_is_ready_and_what_was_refused_with_its_reason(partly, say):
    missing = "model.onnx is missing, or not a plain file; publish it again"

    assert index(say, partly) == [
        ("broken", "1", "UNAVAILABLE", f"broken/1/{missing}"),
        ("tiny", "1", "READY", ""),
        ("tiny", "2", "UNAVAILABLE", f"tiny/2/{missing}"),
        ("tiny", "3", "READY", ""),
    ]
    assert index(say, partly, ready=True) == [
        ("tiny", "1", "READY", ""),
        ("tiny", "3", "READY", ""),
    ]


def test_index_lists_what_the_policy_leaves_out(make_bundle, open_repository, rpc_on, say):
    make_bundle(version=2)
    rpc = rpc_on(open_repository(make_bundle().parents[1]))

    assert index(say, rpc) == [
        ("tiny", "1", "UNAVAILABLE", "unloaded"),
        ("tiny", "2", "READY", ""),
    ]


def test_index_lists_what_is_loading_and_other_calls_do_not_wait_for_it(
    make_bundle, open_repository, rpc_on, begin, say
):
    begun, done = threading.Event(), threading.Event()

    def load(path, options):
        begun.set()
        assert done.wait(60)
        return version.load(path, options)

    repository = open_repository(make_bundle().parents[1], look=False, load=load)
    repository.wait_for_orders()
    rpc = rpc_on(repository, control=True)

    loading = begin(rpc, "RepositoryModelLoad", message("RepositoryModelLoad", model_name="tiny"))
    assert begun.wait(60)

    assert index(say, rpc) == [("tiny", "1", "LOADING", "")]
    assert index(say, rpc, ready=True) == []
    assert not say(rpc, "ModelReady", name="tiny").ready
    assert say(rpc, "ServerLive").live
    assert not loading.outcome.done()
    done.set()
    loading.result()
    assert index(say, rpc) == [("tiny", "1", "READY", "")]


def test_index_under_control_lists_what_was_published_since_the_start(make_bundle, controlled, say):
    make_bundle(version=2)
    make_bundle(name="newcomer")

    assert index(say, controlled) == [
        ("broken", "1", "UNAVAILABLE", "unloaded"),
        ("newcomer", "1", "UNAVAILABLE", "unloaded"),
        ("tiny", "1", "UNAVAILABLE", "unloaded"),
        ("tiny", "2", "UNAVAILABLE", "unloaded"),
    ]


def test_index_lists_what_still_answers_its_last_requests(
    make_bundle, open_repository, gate, rpc_on, begin, say, refused, infer, tiny
):
    rpc = rpc_on(open_repository(make_bundle().parents[1], load=gate.load), control=True)
    last = begin(rpc, "ModelInfer", infer(tiny.images(1)))
    gate.wait()

    say(rpc, "RepositoryModelUnload", model_name="tiny")

    assert index(say, rpc) == [("tiny", "1", "UNLOADING", "")]
    assert refused(rpc, "ModelInfer", infer(tiny.images(1)))[0] == "UNAVAILABLE"
    gate.open()
    assert message("ModelInfer", "Response").FromString(last.result()).outputs


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_nothing_is_loaded_or_unloaded_by_request_unless_the_server_is_told_so(
    rpc, say, refused, method
):
    assert refused(rpc, method, model_name="tiny") == ("UNAVAILABLE", POLLING)
    assert say(rpc, "ModelReady", name="tiny").ready


def test_model_is_loaded_and_unloaded_by_request(controlled, say, refused, infer, tiny):
    assert say(controlled, "ServerReady").ready  # and waits for orders
    assert refused(controlled, "ModelInfer", infer(tiny.images(1)))[0] == "UNAVAILABLE"

    say(controlled, "RepositoryModelLoad", model_name="tiny")
    assert say(controlled, "ModelInfer", infer(tiny.images(1))).model_version == "1"
    say(controlled, "RepositoryModelUnload", model_name="tiny")

    assert refused(controlled, "ModelInfer", infer(tiny.images(1)))[0] == "UNAVAILABLE"
    assert ("tiny", "1", "READY", "") not in index(say, controlled)
    say(controlled, "RepositoryModelLoad", model_name="tiny")
    assert say(controlled, "ModelReady", name="tiny").ready


def parameters(**values):
    made = {}
    for name, value in values.items():
        kind = {str: "string", bytes: "bytes", bool: "bool", int: "int64"}[type(value)]
        made[name] = inference_pb2.ModelRepositoryParameter(**{f"{kind}_param": value})
    return made


@pytest.mark.parametrize("value", [True, False])
def test_unload_dependents_is_accepted(controlled, say, value):
    say(controlled, "RepositoryModelLoad", model_name="tiny")

    say(
        controlled,
        "RepositoryModelUnload",
        model_name="tiny",
        parameters=parameters(unload_dependents=value),
    )

    assert not say(controlled, "ModelReady", name="tiny").ready


def test_what_is_not_known_cannot_be_unloaded(controlled, refused):
    assert refused(controlled, "RepositoryModelUnload", model_name="none") == (
        "NOT_FOUND",
        "Request for unknown model: 'none' is not found",
    )


def test_load_that_fails_says_why(controlled, say, refused):
    assert refused(controlled, "RepositoryModelLoad", model_name="none") == (
        "INTERNAL",
        "failed to load 'none', no version is available",
    )
    assert refused(controlled, "RepositoryModelLoad", model_name="broken") == (
        "INTERNAL",
        "failed to load 'broken', broken/1/model.onnx is missing, or not a plain file; "
        "publish it again",
    )
    assert not say(controlled, "ModelReady", name="broken").ready


def test_load_that_fails_leaves_what_was_served(
    make_bundle, controlled, say, refused, infer, tiny, tmp_path
):
    say(controlled, "RepositoryModelLoad", model_name="tiny")
    make_bundle(version=2).joinpath("model.onnx").unlink()

    status, text = refused(controlled, "RepositoryModelLoad", model_name="tiny")

    assert status == "INTERNAL"
    assert text.startswith("failed to load 'tiny', tiny/2/model.onnx is missing")
    assert say(controlled, "ModelInfer", infer(tiny.images(1))).model_version == "1"


def test_config_of_a_load_changes_how_the_model_is_served(controlled, say, refused, infer, tiny):
    def load(config=None):
        more = {} if config is None else {"parameters": parameters(config=json.dumps(config))}
        say(controlled, "RepositoryModelLoad", model_name="tiny", **more)
        return say(controlled, "ModelConfig", name="tiny").config.max_batch_size

    assert load({"max_batch_size": 2}) == 2
    assert "must be <= 2" in refused(controlled, "ModelInfer", infer(tiny.images(3)))[1]
    assert load({"maxBatchSize": 4, "name": "tiny", "whatever": [1]}) == 4
    assert len(say(controlled, "ModelInfer", infer(tiny.images(4))).outputs) == 2
    assert load() == 8


@pytest.mark.parametrize(
    "value", ["", "{", "[]", '"x"', '{"max_batch_size": "many"}', "[" * 10_000, 7, True, b"{}"]
)
def test_config_that_is_none_is_refused_and_nothing_is_loaded(controlled, say, refused, value):
    request = parameters(config=value)

    status, text = refused(controlled, "RepositoryModelLoad", model_name="tiny", parameters=request)

    assert status == "INVALID_ARGUMENT"
    assert "'config'" in text
    assert not say(controlled, "ModelReady", name="tiny").ready


@pytest.mark.parametrize("name", ["file:1/model.onnx", "file:" + "x" * 70_000, "nonsense"])
def test_files_and_other_parameters_of_a_load_are_refused(controlled, say, refused, name):
    made = {**parameters(config="{}"), name: next(iter(parameters(a=b"\x08").values()))}

    status, text = refused(controlled, "RepositoryModelLoad", model_name="tiny", parameters=made)

    assert status == "UNIMPLEMENTED"
    assert text.startswith(f"the parameter '{name[:64]}' is not done here")
    assert not say(controlled, "ModelReady", name="tiny").ready


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
@pytest.mark.parametrize(
    "name", ["", " ", "a b", "..", "../tiny", "tiny/1", "/etc", ".hidden", "-x", "ä", "x" * 129]
)
def test_name_that_is_none_is_refused_before_the_disk_is_looked_at(rpc_on, refused, method, name):
    assert refused(rpc_on(Broken(KeyError("disk")), control=True), method, model_name=name) == (
        "INVALID_ARGUMENT",
        f"'{name}' is not the name of a model; expected letters, digits, '.', '_' and '-', "
        "with a letter or digit first, 128 at most",
    )


@pytest.mark.parametrize("name", ["a", "9", "a.b_c-D", "x" * 128])
def test_longest_and_strangest_names_are_looked_for(controlled, refused, name):
    assert refused(controlled, "RepositoryModelLoad", model_name=name)[0] == "INTERNAL"


def test_answer_has_the_version_the_id_and_every_output(partly, say, infer, tiny):
    images = tiny.images(5)

    answer = say(partly, "ModelInfer", infer(images, id="call-7"))

    assert (answer.model_name, answer.model_version, answer.id) == ("tiny", "3", "call-7")
    assert [output.name for output in answer.outputs] == ["probabilities", "logits"]
    assert [(output.datatype, list(output.shape)) for output in answer.outputs] == [
        ("FP32", [5, 3])
    ] * 2
    assert not any(output.HasField("contents") for output in answer.outputs)
    probabilities, logits = (
        np.frombuffer(raw, "<f4").reshape(5, 3) for raw in answer.raw_output_contents
    )
    np.testing.assert_allclose(logits, tiny.logits(images), rtol=1e-6)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)


def test_named_version_answers_though_it_is_not_the_highest(partly, say, infer, tiny):
    request = infer(tiny.images(1), model_version="1")

    assert say(partly, "ModelInfer", request).model_version == "1"


def test_asked_outputs_come_in_the_asked_order_as_numbers_or_as_classes(rpc, say, infer, tiny):
    images = tiny.images(2)
    request = infer(images)
    request.outputs.add(name="logits")
    request.outputs.add(name="probabilities").parameters["classification"].int64_param = 1

    answer = say(rpc, "ModelInfer", request)

    assert [output.name for output in answer.outputs] == ["logits", "probabilities"]
    np.testing.assert_allclose(
        np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(2, 3),
        tiny.logits(images),
        rtol=1e-6,
    )
    assert (answer.outputs[1].datatype, answer.outputs[1].shape) == ("BYTES", [2, 1])
    for winner in tiny.logits(images).argmax(axis=1):
        assert f":{winner}:{tiny.labels[winner]}".encode() in answer.raw_output_contents[1]


def test_typed_contents_are_answered_raw(rpc, say, infer, tiny):
    images = tiny.images(2)
    request = infer(images, raw_input_contents=[])
    request.inputs[0].contents.uint_contents.extend(images.ravel().tolist())

    assert say(rpc, "ModelInfer", request) == say(rpc, "ModelInfer", infer(images))


def test_generic_model_of_variable_size_is_answered(
    make_generic_bundle, open_repository, rpc_on, say
):
    rpc = rpc_on(open_repository(make_generic_bundle().parents[1]))

    for length in (1, 3, 1000):
        x = np.linspace(-1, 1, 2 * length, dtype=np.float32).reshape(2, length)
        request = inference_pb2.ModelInferRequest(
            model_name="line", raw_input_contents=[x.tobytes()]
        )
        request.inputs.add(name="x", datatype="FP32", shape=x.shape)
        answer = say(rpc, "ModelInfer", request)
        np.testing.assert_array_equal(
            np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(2, length), 2 * x - 1
        )


def test_absent_id_stays_absent(rpc, say, infer, tiny):
    assert say(rpc, "ModelInfer", infer(tiny.images(1))).id == ""


def test_answer_of_a_stream_is_the_answer_and_says_that_it_is_the_last(rpc, say, infer, tiny):
    answer = say(rpc, "ModelInfer", infer(tiny.images(1), id="a"))

    streamed = inference_pb2.ModelStreamInferResponse.FromString(
        stream_answer(answer.SerializeToString())
    )

    assert not streamed.error_message
    assert streamed.infer_response.parameters["triton_final_response"].bool_param
    del streamed.infer_response.parameters["triton_final_response"]
    assert streamed.infer_response == answer


def test_refusal_of_a_stream_has_its_text_and_the_id():
    streamed = inference_pb2.ModelStreamInferResponse.FromString(
        stream_refusal(CallError(Status.NOT_FOUND, "not here"), "call-7")
    )

    assert streamed.error_message == "not here"
    assert streamed.infer_response == inference_pb2.ModelInferResponse(id="call-7")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("/secret/path is broken"),
        KeyError("/secret/path"),
        errors.ModelError("/secret/path is broken"),
        errors.BundleError("/secret/path is broken"),
    ],
)
@pytest.mark.parametrize(
    "method",
    [name for name in ANSWERED if name not in ("ServerLive", "ServerMetadata")],
)
def test_text_of_an_internal_error_reaches_the_log_and_not_the_client(
    rpc_on, refused, caplog, error, method
):
    rpc = rpc_on(Broken(error), control=True)
    fields = {"model_name": "tiny"} if method.startswith("RepositoryModel") else {}

    with caplog.at_level(logging.ERROR):
        status, text = refused(rpc, method, **fields)

    assert status == "INTERNAL"
    assert "secret" not in text
    token = text.removeprefix("internal error, request ")
    assert len(token) == 8
    assert token in caplog.text
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize("path", PATHS)
def test_bytes_that_are_no_message_are_the_clients_fault(rpc, begin, path):
    with pytest.raises(CallError) as caught:
        begin(rpc, path, b"\x0a\xff").result()

    assert (caught.value.status, str(caught.value)) == (
        Status.INVALID_ARGUMENT,
        f"the request is not a message of {path}",
    )


@pytest.mark.parametrize("path", PATHS)
@given(content=st.binary(max_size=64))
def test_arbitrary_bytes_are_answered_or_refused_and_never_internal(partly, begin, path, content):
    try:
        assert isinstance(begin(partly, path, content).result(), bytes)
    except CallError as error:
        assert error.status != Status.INTERNAL
        assert str(error)


@settings(max_examples=300)
@given(
    rows=st.integers(1, 9),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    cut=st.none() | st.integers(0, 60),
)
def test_mutated_inference_is_answered_or_refused_and_never_internal(
    partly, begin, infer, tiny, rows, flips, cut
):
    content = bytearray(infer(tiny.images(rows), id="call-7").SerializeToString())
    for at, value in flips:
        content[at % len(content)] = value

    try:
        answer = begin(partly, "ModelInfer", bytes(content[:cut])).result()
    except CallError as error:
        assert error.status != Status.INTERNAL
    else:
        assert inference_pb2.ModelInferResponse.FromString(answer).model_name == "tiny"


def test_repository_that_is_lost_is_named_to_nobody(controlled, say, refused, tmp_path):
    shutil.rmtree(tmp_path / "models")

    for name in ("tiny", "none"):
        text = refused(controlled, "RepositoryModelLoad", model_name=name)[1]
        assert text == f"failed to load '{name}', the repository cannot be read"
    assert str(tmp_path) not in str(say(controlled, "RepositoryIndex"))


def test_rpc_that_drains_answers_all_but_inference(rpc, say, refused, infer, tiny):
    assert rpc.is_idle()

    rpc.drain()

    assert refused(rpc, "ModelInfer", infer(tiny.images(1)))[0] == "UNAVAILABLE"
    assert say(rpc, "ServerLive").live
    assert say(rpc, "ModelMetadata", name="tiny").name == "tiny"
    assert say(rpc, "ModelStatistics").model_stats
    assert rpc.is_idle()


@pytest.mark.parametrize("name", ["ServerLive", "ModelConfig", "RepositoryIndex"])
def test_large_request_that_has_no_tensors_is_refused_unparsed(rpc, asked, name):
    call = asked(f"{INFERENCE}{name}", b"\x78\x01" * (1 << 20))

    rpc.begin(call)

    with pytest.raises(CallError) as caught:
        call.result()
    assert caught.value.status is Status.INVALID_ARGUMENT
    assert str(caught.value) == "the request has 2097152 bytes, expected at most 1048576"


def test_request_that_is_large_beside_its_tensors_is_refused_unparsed(rpc, asked):
    call = asked(INFER, b"\x2a\x00" * (1 << 20))

    rpc.begin(call)

    with pytest.raises(CallError) as caught:
        call.result()
    assert caught.value.status is Status.INVALID_ARGUMENT
    assert "beside its tensors' contents more than" in str(caught.value)
