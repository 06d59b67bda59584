import subprocess
import sys

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FieldDescriptor

from protos import bundle_pb2, inference_pb2, parity_pb2, pool

# Triton's numbers and types, and field 6 of ModelMetadataResponse from the Open Inference Protocol.
# "repeated" and "map" come before the type; a message's type is its name.
INFERENCE = {
    "ServerLiveRequest": {},
    "ServerLiveResponse": {"live": (1, "bool")},
    "ServerReadyRequest": {},
    "ServerReadyResponse": {"ready": (1, "bool")},
    "ModelReadyRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelReadyResponse": {"ready": (1, "bool")},
    "ServerMetadataRequest": {},
    "ServerMetadataResponse": {
        "name": (1, "string"),
        "version": (2, "string"),
        "extensions": (3, "repeated string"),
    },
    "ModelMetadataRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelMetadataResponse": {
        "name": (1, "string"),
        "versions": (2, "repeated string"),
        "platform": (3, "string"),
        "inputs": (4, "repeated TensorMetadata"),
        "outputs": (5, "repeated TensorMetadata"),
        "properties": (6, "map string string"),
    },
    "ModelMetadataResponse.TensorMetadata": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "repeated int64"),
    },
    "InferParameter": {
        "bool_param": (1, "bool"),
        "int64_param": (2, "int64"),
        "string_param": (3, "string"),
        "double_param": (4, "double"),
        "uint64_param": (5, "uint64"),
    },
    "InferTensorContents": {
        "bool_contents": (1, "repeated bool"),
        "int_contents": (2, "repeated int32"),
        "int64_contents": (3, "repeated int64"),
        "uint_contents": (4, "repeated uint32"),
        "uint64_contents": (5, "repeated uint64"),
        "fp32_contents": (6, "repeated float"),
        "fp64_contents": (7, "repeated double"),
        "bytes_contents": (8, "repeated bytes"),
    },
    "ModelInferRequest": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "map string InferParameter"),
        "inputs": (5, "repeated InferInputTensor"),
        "outputs": (6, "repeated InferRequestedOutputTensor"),
        "raw_input_contents": (7, "repeated bytes"),
    },
    "ModelInferRequest.InferInputTensor": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "repeated int64"),
        "parameters": (4, "map string InferParameter"),
        "contents": (5, "InferTensorContents"),
    },
    "ModelInferRequest.InferRequestedOutputTensor": {
        "name": (1, "string"),
        "parameters": (2, "map string InferParameter"),
    },
    "ModelInferResponse": {
        "model_name": (1, "string"),
        "model_version": (2, "string"),
        "id": (3, "string"),
        "parameters": (4, "map string InferParameter"),
        "outputs": (5, "repeated InferOutputTensor"),
        "raw_output_contents": (6, "repeated bytes"),
    },
    "ModelInferResponse.InferOutputTensor": {
        "name": (1, "string"),
        "datatype": (2, "string"),
        "shape": (3, "repeated int64"),
        "parameters": (4, "map string InferParameter"),
        "contents": (5, "InferTensorContents"),
    },
    "RepositoryIndexRequest": {"repository_name": (1, "string"), "ready": (2, "bool")},
    "RepositoryIndexResponse": {"models": (1, "repeated ModelIndex")},
    "RepositoryIndexResponse.ModelIndex": {
        "name": (1, "string"),
        "version": (2, "string"),
        "state": (3, "string"),
        "reason": (4, "string"),
    },
}
SCALARS = {
    value: name.removeprefix("TYPE_").lower()
    for name, value in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def described(field):
    if field.type != FieldDescriptor.TYPE_MESSAGE:
        kind = SCALARS[field.type]
    elif field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name
        return f"map {described(entry['key'])} {described(entry['value'])}"
    else:
        kind = field.message_type.name
    return f"repeated {kind}" if field.is_repeated else kind


def messages(owner, prefix=""):
    """Return every message by its name in the package, map entries left out."""
    found = {}
    for message in owner:
        if not message.GetOptions().map_entry:
            found[prefix + message.name] = message
            found |= messages(message.nested_types, f"{prefix}{message.name}.")
    return found


def test_fields_have_the_numbers_and_types_that_clients_of_the_protocol_send():
    found = messages(inference_pb2.DESCRIPTOR.message_types_by_name.values())

    assert {
        name: {field.name: (field.number, described(field)) for field in message.fields}
        for name, message in found.items()
    } == INFERENCE


def test_parameters_are_one_of_a_choice():
    (choice,) = inference_pb2.InferParameter.DESCRIPTOR.oneofs

    assert choice.name == "parameter_choice"
    assert len(choice.fields) == 5


@pytest.mark.parametrize(
    ("service", "paths"),
    [
        (
            inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
            {
                "ServerLive",
                "ServerReady",
                "ModelReady",
                "ServerMetadata",
                "ModelMetadata",
                "ModelInfer",
                "RepositoryIndex",
            },
        ),
        (parity_pb2.DESCRIPTOR.services_by_name["ParityService"], {"GetParity"}),
    ],
)
def test_rpcs_are_unary_and_named_after_their_messages(service, paths):
    assert {method.name for method in service.methods} == paths
    for method in service.methods:
        assert not method.client_streaming
        assert not method.server_streaming
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"


def test_services_have_their_names():
    services = [*inference_pb2.DESCRIPTOR.services_by_name.values()]
    services += parity_pb2.DESCRIPTOR.services_by_name.values()

    assert [service.full_name for service in services] == [
        "inference.GRPCInferenceService",
        "train_export.v1.ParityService",
    ]


def test_no_integer_of_a_manifest_is_64_bits_wide():
    wide = {"int64", "uint64", "fixed64", "sfixed64", "sint64"}
    found = messages(bundle_pb2.DESCRIPTOR.message_types_by_name.values())

    assert found
    assert not [
        f"{name}.{field.name}"
        for name, message in found.items()
        for field in message.fields
        if wide & set(described(field).split())
    ]


def test_messages_live_in_a_pool_of_their_own():
    assert inference_pb2.DESCRIPTOR.pool is pool.Default()
    assert pool.Default() is not descriptor_pool.Default()


PREPARE = """
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

file = descriptor_pb2.FileDescriptorProto(
    name="grpc_service.proto", package="inference", syntax="proto3"
)
message = file.message_type.add(name="ModelInferRequest")
message.field.add(name="other", number=1, type=3, label=1)
default = descriptor_pool.Default()
"""
OURS = """
from protos import bundle_pb2, inference_pb2, inference_pb2_grpc, parity_pb2, parity_pb2_grpc

ours = inference_pb2.ModelInferRequest(model_name="m", inputs=[{"name": "x"}])
assert inference_pb2.ModelInferRequest.FromString(ours.SerializeToString()) == ours
"""
THEIRS = """
default.AddSerializedFile(file.SerializeToString())
theirs = default.FindMessageTypeByName("inference.ModelInferRequest")
Other = message_factory.GetMessageClass(theirs)
assert Other.FromString(Other(other=7).SerializeToString()).other == 7
assert not hasattr(Other(), "model_name")
"""


@pytest.mark.parametrize("parts", [(THEIRS, OURS), (OURS, THEIRS)], ids=["theirs", "ours"])
def test_another_inference_package_may_live_in_the_same_process(parts):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREPARE + "".join(parts)],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
