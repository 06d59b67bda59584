import subprocess
import sys

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FieldDescriptor

from protos import bundle_pb2, inference_pb2, model_config_pb2, parity_pb2, pool

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
    "ModelStreamInferResponse": {
        "error_message": (1, "string"),
        "infer_response": (2, "ModelInferResponse"),
    },
    "ModelConfigRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelConfigResponse": {"config": (1, "ModelConfig")},
    "ModelStatisticsRequest": {"name": (1, "string"), "version": (2, "string")},
    "ModelStatisticsResponse": {"model_stats": (1, "repeated ModelStatistics")},
    "StatisticDuration": {"count": (1, "uint64"), "ns": (2, "uint64")},
    "InferStatistics": {
        "success": (1, "StatisticDuration"),
        "fail": (2, "StatisticDuration"),
        "queue": (3, "StatisticDuration"),
        "compute_input": (4, "StatisticDuration"),
        "compute_infer": (5, "StatisticDuration"),
        "compute_output": (6, "StatisticDuration"),
        "cache_hit": (7, "StatisticDuration"),
        "cache_miss": (8, "StatisticDuration"),
    },
    "InferBatchStatistics": {
        "batch_size": (1, "uint64"),
        "compute_input": (2, "StatisticDuration"),
        "compute_infer": (3, "StatisticDuration"),
        "compute_output": (4, "StatisticDuration"),
    },
    "ModelStatistics": {
        "name": (1, "string"),
        "version": (2, "string"),
        "last_inference": (3, "uint64"),
        "inference_count": (4, "uint64"),
        "execution_count": (5, "uint64"),
        "inference_stats": (6, "InferStatistics"),
        "batch_stats": (7, "repeated InferBatchStatistics"),
    },
    "ModelRepositoryParameter": {
        "bool_param": (1, "bool"),
        "int64_param": (2, "int64"),
        "string_param": (3, "string"),
        "bytes_param": (4, "bytes"),
    },
    "RepositoryModelLoadRequest": {
        "repository_name": (1, "string"),
        "model_name": (2, "string"),
        "parameters": (3, "map string ModelRepositoryParameter"),
    },
    "RepositoryModelLoadResponse": {},
    "RepositoryModelUnloadRequest": {
        "repository_name": (1, "string"),
        "model_name": (2, "string"),
        "parameters": (3, "map string ModelRepositoryParameter"),
    },
    "RepositoryModelUnloadResponse": {},
    "RepositoryIndexRequest": {"repository_name": (1, "string"), "ready": (2, "bool")},
    "RepositoryIndexResponse": {"models": (1, "repeated ModelIndex")},
    "RepositoryIndexResponse.ModelIndex": {
        "name": (1, "string"),
        "version": (2, "string"),
        "state": (3, "string"),
        "reason": (4, "string"),
    },
}
MODEL_CONFIG = {
    "ModelInput": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "dims": (4, "repeated int64"),
    },
    "ModelOutput": {
        "name": (1, "string"),
        "data_type": (2, "DataType"),
        "dims": (3, "repeated int64"),
        "label_filename": (4, "string"),
    },
    "ModelVersionPolicy": {
        "latest": (1, "Latest"),
        "all": (2, "All"),
        "specific": (3, "Specific"),
    },
    "ModelVersionPolicy.Latest": {"num_versions": (1, "uint32")},
    "ModelVersionPolicy.All": {},
    "ModelVersionPolicy.Specific": {"versions": (1, "repeated int64")},
    "ModelInstanceGroup": {"name": (1, "string"), "count": (2, "int32"), "kind": (4, "Kind")},
    "ModelQueuePolicy": {
        "timeout_action": (1, "TimeoutAction"),
        "default_timeout_microseconds": (2, "uint64"),
        "allow_timeout_override": (3, "bool"),
        "max_queue_size": (4, "uint32"),
    },
    "ModelDynamicBatching": {
        "preferred_batch_size": (1, "repeated int32"),
        "max_queue_delay_microseconds": (2, "uint64"),
        "preserve_ordering": (3, "bool"),
        "priority_levels": (4, "uint64"),
        "default_priority_level": (5, "uint64"),
        "default_queue_policy": (6, "ModelQueuePolicy"),
    },
    "ModelTransactionPolicy": {"decoupled": (1, "bool")},
    "ModelParameter": {"string_value": (1, "string")},
    "ModelConfig": {
        "name": (1, "string"),
        "platform": (2, "string"),
        "version_policy": (3, "ModelVersionPolicy"),
        "max_batch_size": (4, "int32"),
        "input": (5, "repeated ModelInput"),
        "output": (6, "repeated ModelOutput"),
        "instance_group": (7, "repeated ModelInstanceGroup"),
        "default_model_filename": (8, "string"),
        "dynamic_batching": (11, "ModelDynamicBatching"),
        "parameters": (14, "map string ModelParameter"),
        "backend": (17, "string"),
        "model_transaction_policy": (19, "ModelTransactionPolicy"),
    },
}
DATA_TYPES = (
    "INVALID BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 FP32 FP64 STRING BF16"
)
SCALARS = {
    value: name.removeprefix("TYPE_").lower()
    for name, value in vars(FieldDescriptor).items()
    if name.startswith("TYPE_")
}


def described(field):
    if field.type == FieldDescriptor.TYPE_ENUM:
        kind = field.enum_type.name
    elif field.type != FieldDescriptor.TYPE_MESSAGE:
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


@pytest.mark.parametrize(
    ("module", "table"),
    [(inference_pb2, INFERENCE), (model_config_pb2, MODEL_CONFIG)],
    ids=["inference", "model_config"],
)
def test_fields_have_the_numbers_and_types_that_clients_of_the_protocol_send(module, table):
    found = messages(module.DESCRIPTOR.message_types_by_name.values())

    assert module.DESCRIPTOR.package == "inference"
    assert {
        name: {field.name: (field.number, described(field)) for field in message.fields}
        for name, message in found.items()
    } == table


@pytest.mark.parametrize(
    ("message", "name", "count"),
    [
        (inference_pb2.InferParameter, "parameter_choice", 5),
        (inference_pb2.ModelRepositoryParameter, "parameter_choice", 4),
        (model_config_pb2.ModelVersionPolicy, "policy_choice", 3),
    ],
)
def test_only_one_of_a_choice_is_set(message, name, count):
    (choice,) = message.DESCRIPTOR.oneofs

    assert choice.name == name
    assert len(choice.fields) == len(message.DESCRIPTOR.fields) == count


def test_enumerations_have_the_numbers_of_triton():
    group = model_config_pb2.ModelInstanceGroup.Kind
    action = model_config_pb2.ModelQueuePolicy.TimeoutAction

    assert dict(model_config_pb2.DataType.items()) == {
        f"TYPE_{name}": number for number, name in enumerate(DATA_TYPES.split())
    }
    assert dict(group.items()) == {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2, "KIND_MODEL": 3}
    assert dict(action.items()) == {"REJECT": 0, "DELAY": 1}


@pytest.mark.parametrize(
    ("service", "unary", "streamed", "both_ways"),
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
                "ModelConfig",
                "ModelStatistics",
                "RepositoryIndex",
                "RepositoryModelLoad",
                "RepositoryModelUnload",
            },
            {"ModelStreamInfer": ("ModelInferRequest", "ModelStreamInferResponse")},
            True,
        ),
        (
            parity_pb2.DESCRIPTOR.services_by_name["ParityService"],
            {"GetParity", "ReportShadow"},
            {
                "SampleTraffic": ("SampleTrafficRequest", "SampledRows"),
                "StreamParity": ("GetParityRequest", "GetParityResponse"),
            },
            False,
        ),
    ],
)
def test_rpcs_are_unary_and_named_after_their_messages_but_for_the_streams(
    service, unary, streamed, both_ways
):
    assert {method.name for method in service.methods} == unary | streamed.keys()
    for method in service.methods:
        assert method.client_streaming is (both_ways and method.name in streamed)
        assert method.server_streaming is (method.name in streamed)
        own = f"{method.name}Request", f"{method.name}Response"
        named = method.input_type.name, method.output_type.name
        assert named == streamed.get(method.name, own)


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
