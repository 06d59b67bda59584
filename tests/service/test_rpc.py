import dataclasses
import logging
from importlib.metadata import version as package_version
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import inference_pb2, parity_pb2
from service import errors
from service.rpc import MAX_MESSAGE_CHARACTERS, STATUS, CallError, Rpc, Status

INFERENCE = "/inference.GRPCInferenceService/"
PARITY = "/train_export.v1.ParityService/GetParity"
PATHS = [
    *(
        INFERENCE + name
        for name in (
            "ServerLive",
            "ServerReady",
            "ModelReady",
            "ServerMetadata",
            "ModelMetadata",
            "ModelInfer",
            "RepositoryIndex",
        )
    ),
    PARITY,
]


def ask(rpc, method, request=None):
    """Call a method of the inference service with a message and return its answer."""
    request = request or getattr(inference_pb2, f"{method}Request")()
    content = rpc.call(INFERENCE + method, request.SerializeToString())
    return getattr(inference_pb2, f"{method}Response").FromString(content)


def refused(rpc, method, request):
    with pytest.raises(CallError) as caught:
        ask(rpc, method, request)
    return caught.value.status.name, str(caught.value)


@pytest.fixture
def partly(make_bundle, load):
    """An Rpc on tiny 1 and 3, a refused tiny 2, and a model with no good version."""
    for name, version in (("tiny", 2), ("broken", 1)):
        make_bundle(name=name, version=version).joinpath("model.onnx").unlink()
    make_bundle(version=3)
    return Rpc(load(make_bundle()))


def test_every_error_that_reaches_a_client_has_a_status_and_the_others_stay_inside():
    def walk(kind):
        return {kind}.union(*(walk(child) for child in kind.__subclasses__()))

    inside = {
        errors.ServiceError,
        errors.BundleError,
        errors.ModelError,
        errors.RepositoryError,
        errors.SettingsError,
        errors.AddressError,
        errors.PictureError,
        errors.ServerError,
    }

    assert walk(errors.ServiceError) == inside | set(STATUS)
    assert not inside & set(STATUS)


def test_every_error_is_in_the_tree_of_the_docstring():
    kinds = [
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.ServiceError)
    ]

    assert all(name in (errors.__doc__ or "") for name in kinds)


def test_every_rpc_of_the_protos_is_answered_and_only_the_model_computes(rpc):
    services = [
        inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
        parity_pb2.DESCRIPTOR.services_by_name["ParityService"],
    ]
    paths = [
        f"/{service.full_name}/{method.name}" for service in services for method in service.methods
    ]

    assert sorted(rpc.methods) == sorted(paths) == sorted(PATHS)
    assert [path for path in rpc.methods if rpc.methods[path].computes] == [
        INFERENCE + "ModelInfer"
    ]


def test_server_is_ready_only_when_every_model_has_a_version_that_answers(partly):
    assert ask(partly, "ServerLive").live
    assert not ask(partly, "ServerReady").ready


def test_server_is_live_and_ready_and_says_what_it_is(rpc):
    assert ask(rpc, "ServerLive").live
    assert ask(rpc, "ServerReady").ready
    about = ask(rpc, "ServerMetadata")
    assert (about.name, about.version) == ("train-export", package_version("train-export"))
    assert about.extensions == ["binary_tensor_data", "model_repository"]


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [
        ("tiny", "", True),
        ("tiny", "3", True),
        ("tiny", "2", False),
        ("tiny", "4", False),
        ("broken", "", False),
        ("none", "", False),
    ],
)
def test_model_readiness_is_an_answer_and_not_an_error(partly, name, version, ready):
    request = inference_pb2.ModelReadyRequest(name=name, version=version)

    assert ask(partly, "ModelReady", request).ready is ready


def test_model_readiness_of_a_version_that_is_no_number_is_refused(partly):
    request = inference_pb2.ModelReadyRequest(name="tiny", version="x")

    assert refused(partly, "ModelReady", request)[0] == "INVALID_ARGUMENT"


def test_metadata_names_tensors_versions_and_properties(partly):
    about = ask(partly, "ModelMetadata", inference_pb2.ModelMetadataRequest(name="tiny"))

    assert (about.name, about.versions, about.platform) == ("tiny", ["1", "3"], "onnxruntime_onnx")
    tensors = inference_pb2.ModelMetadataResponse.TensorMetadata
    assert list(about.inputs) == [tensors(name="image", datatype="UINT8", shape=[-1, 2, 2, 1])]
    assert list(about.outputs) == [
        tensors(name="probabilities", datatype="FP32", shape=[-1, 3]),
        tensors(name="logits", datatype="FP32", shape=[-1, 3]),
    ]
    assert about.properties["labels"] == '["dark", "light", "striped"]'


def test_index_lists_what_is_ready_and_what_was_refused_with_its_reason(partly):
    index = [
        (model.name, model.version, model.state, model.reason)
        for model in ask(partly, "RepositoryIndex").models
    ]

    missing = "model.onnx is missing, or not a plain file; publish it again"
    assert index == [
        ("tiny", "1", "READY", ""),
        ("tiny", "3", "READY", ""),
        ("broken", "1", "UNAVAILABLE", f"broken/1/{missing}"),
        ("tiny", "2", "UNAVAILABLE", f"tiny/2/{missing}"),
    ]
    ready = inference_pb2.RepositoryIndexRequest(ready=True)
    assert [model.version for model in ask(partly, "RepositoryIndex", ready).models] == ["1", "3"]


def fake(repository: Any) -> Rpc:
    return Rpc(repository)


class Loading:
    """A repository in the middle of its work."""

    max_batch_rows = 8

    def versions(self):
        return []

    def loading(self):
        return [("tiny", 1)]

    def refused(self):
        return {}


def test_index_lists_what_is_loading():
    models = ask(fake(Loading()), "RepositoryIndex").models

    assert [(m.name, m.version, m.state, m.reason) for m in models] == [
        ("tiny", "1", "LOADING", "")
    ]
    ready = inference_pb2.RepositoryIndexRequest(ready=True)
    assert not ask(fake(Loading()), "RepositoryIndex", ready).models


def test_answer_has_the_version_the_id_and_every_output(partly, infer, tiny):
    images = tiny.images(5)

    answer = ask(partly, "ModelInfer", infer(images, id="call-7"))

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


def test_named_version_answers_though_it_is_not_the_highest(partly, infer, tiny):
    request = infer(tiny.images(1), model_version="1")

    assert ask(partly, "ModelInfer", request).model_version == "1"


def test_asked_outputs_come_in_the_asked_order(rpc, infer, tiny):
    request = infer(tiny.images(2))
    for name in ("logits", "probabilities"):
        request.outputs.add(name=name)

    answer = ask(rpc, "ModelInfer", request)

    assert [output.name for output in answer.outputs] == ["logits", "probabilities"]
    np.testing.assert_allclose(
        np.frombuffer(answer.raw_output_contents[0], "<f4").reshape(2, 3),
        tiny.logits(tiny.images(2)),
        rtol=1e-6,
    )


def test_absent_id_stays_absent(rpc, infer, tiny):
    assert ask(rpc, "ModelInfer", infer(tiny.images(1))).id == ""


def edited(**fields):
    """Return an edit of a request's own fields."""

    def edit(request):
        for name, value in fields.items():
            setattr(request, name, value)

    return edit


def edited_input(**fields):
    def edit(request):
        for name, value in fields.items():
            setattr(request.inputs[0], name, value)

    return edit


def asking(*names):
    def edit(request):
        for name in names:
            request.outputs.add(name=name)

    return edit


REFUSALS = [
    (
        edited(model_name="none"),
        "NOT_FOUND",
        "Request for unknown model: 'none' is not found",
    ),
    (
        edited(model_version="4"),
        "NOT_FOUND",
        "Request for unknown model: 'tiny' version 4 is not found",
    ),
    (
        edited(model_version="one"),
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string 'one'; expected a whole number",
    ),
    (
        edited(model_version="2"),
        "UNAVAILABLE",
        "Request for unknown model: 'tiny' version 2 is not at ready state",
    ),
    (
        edited(model_name="broken"),
        "UNAVAILABLE",
        "Request for unknown model: 'broken' has no available versions",
    ),
    (
        edited_input(name="pixels"),
        "INVALID_ARGUMENT",
        "unexpected inference input 'pixels' for model 'tiny'; expected 'image'",
    ),
    (
        edited_input(datatype="INT8"),
        "INVALID_ARGUMENT",
        "inference input 'image' data-type is 'INT8', but model 'tiny' expects 'UINT8'",
    ),
    (
        lambda request: request.inputs[0].shape.append(1),
        "INVALID_ARGUMENT",
        "unexpected shape for input 'image' for model 'tiny'. Expected [-1,2,2,1], got [1,2,2,1,1]",
    ),
    (
        lambda request: request.inputs[0].shape.__setitem__(0, 0),
        "INVALID_ARGUMENT",
        "unexpected shape for input 'image' for model 'tiny'. Expected [-1,2,2,1], got [0,2,2,1]",
    ),
    (
        lambda request: request.inputs[0].shape.__setitem__(0, 9),
        "INVALID_ARGUMENT",
        "inference request batch-size must be <= 8 for 'tiny', got 9; "
        "split it into smaller requests",
    ),
    (
        lambda request: request.raw_input_contents.__setitem__(0, b"abc"),
        "INVALID_ARGUMENT",
        "input byte size mismatch for input 'image' for model 'tiny'. Expected 4, got 3",
    ),
    (
        lambda request: request.inputs[0].contents.SetInParent(),
        "INVALID_ARGUMENT",
        "input 'image' for model 'tiny' is in its 'contents' field; send it in raw_input_contents",
    ),
    (
        lambda request: request.ClearField("inputs"),
        "INVALID_ARGUMENT",
        "expected 1 inputs but got 0 inputs for model 'tiny'; its input is 'image'",
    ),
    (
        asking("boxes"),
        "INVALID_ARGUMENT",
        "unexpected inference output 'boxes' for model 'tiny'; it has probabilities, logits",
    ),
    (
        asking("logits", "logits"),
        "INVALID_ARGUMENT",
        "inference output 'logits' is requested twice for model 'tiny'",
    ),
]


@pytest.mark.parametrize(("edit", "status", "phrase"), REFUSALS)
def test_refusal_has_its_status_and_phrase_after_the_requests_id(
    partly, infer, tiny, edit, status, phrase
):
    for id, prefix in (("call-7", "[request id: call-7] "), ("", "[request id: <id_unknown>] ")):
        request = infer(tiny.images(1), id=id)
        edit(request)
        assert refused(partly, "ModelInfer", request) == (status, prefix + phrase)


@pytest.mark.parametrize(
    ("name", "version", "status"),
    [("none", "", "NOT_FOUND"), ("tiny", "x", "INVALID_ARGUMENT"), ("tiny", "2", "UNAVAILABLE")],
)
def test_metadata_of_what_is_not_served_is_refused(partly, name, version, status):
    request = inference_pb2.ModelMetadataRequest(name=name, version=version)

    assert refused(partly, "ModelMetadata", request)[0] == status


def test_batch_at_the_limit_is_answered(rpc, infer, tiny):
    assert ask(rpc, "ModelInfer", infer(tiny.images(8))).outputs[0].shape == [8, 3]


def test_longest_message_is_kept_and_a_longer_one_is_cut():
    longest = "x" * MAX_MESSAGE_CHARACTERS

    assert str(CallError(Status.INTERNAL, longest)) == longest
    assert str(CallError(Status.INTERNAL, longest + "y")) == longest[:-1] + "…"


class Broken:
    """A repository whose every method raises the same."""

    max_batch_rows = 8

    def __init__(self, error):
        self._error = error

    def __getattr__(self, name):
        raise self._error


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
    "method", ["ServerReady", "RepositoryIndex", "ModelMetadata", "ModelInfer"]
)
def test_text_of_an_internal_error_reaches_the_log_and_not_the_client(caplog, error, method):
    with caplog.at_level(logging.ERROR):
        status, message = refused(fake(Broken(error)), method, None)

    assert status == "INTERNAL"
    assert "secret" not in message
    token = message.removeprefix("internal error, request ")
    assert len(token) == 8
    assert token in caplog.text
    assert "/secret/path" in caplog.text


def test_error_of_a_running_model_stays_inside(rpc, repository, infer, tiny, caplog):
    class Session:
        def run(self, batch):
            raise errors.ModelError("/secret/path")

    served = repository.get("tiny", "")

    class Repository:
        max_batch_rows = 8

        def get(self, name, version):
            return dataclasses.replace(served, session=Session())

    status, message = refused(fake(Repository()), "ModelInfer", infer(tiny.images(1), id="call-7"))

    assert status == "INTERNAL"
    assert "secret" not in message


@pytest.mark.parametrize("path", PATHS)
def test_bytes_that_are_no_message_are_the_clients_fault(rpc, path):
    with pytest.raises(CallError) as caught:
        rpc.call(path, b"\x0a\xff")

    assert (caught.value.status, str(caught.value)) == (
        Status.INVALID_ARGUMENT,
        f"the request is not a message of {path}",
    )


@pytest.mark.parametrize("path", PATHS)
@given(content=st.binary(max_size=64))
def test_arbitrary_bytes_are_answered_or_refused_and_never_internal(partly, path, content):
    try:
        assert isinstance(partly.call(path, content), bytes)
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
    partly, infer, tiny, rows, flips, cut
):
    content = bytearray(infer(tiny.images(rows), id="call-7").SerializeToString())
    for at, value in flips:
        content[at % len(content)] = value

    try:
        answer = partly.call(INFERENCE + "ModelInfer", bytes(content[:cut]))
    except CallError as error:
        assert error.status != Status.INTERNAL
    else:
        assert inference_pb2.ModelInferResponse.FromString(answer).model_name == "tiny"


def test_message_of_an_error_never_names_the_repositorys_folder(partly, infer, tiny, tmp_path):
    folder = str(tmp_path)

    for edit, _, _ in REFUSALS:
        request = infer(tiny.images(1))
        edit(request)
        assert folder not in refused(partly, "ModelInfer", request)[1]
    assert folder not in str(ask(partly, "RepositoryIndex"))
