"""grpcio, its health client and its reflection client, which know nothing of this server."""

from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.conformance.clients.asked import MODEL, SHAPE, WAIT_S

INFERENCE = "inference.GRPCInferenceService"
PARITY = "train_export.v1.ParityService"
HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
SERVING = health_pb2.HealthCheckResponse.SERVING


def call_described(channel, pool, service, method, **fields):
    """Call a method by what reflection says about it, as grpcurl does."""
    described = pool.FindServiceByName(service).FindMethodByName(method)
    call = channel.unary_unary(
        f"/{service}/{method}",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=GetMessageClass(described.output_type).FromString,
    )
    return call(GetMessageClass(described.input_type)(**fields), timeout=WAIT_S)


def check_health(asked, service):
    with grpc.insecure_channel(asked.address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=WAIT_S).status


def health_is_told_of_the_server_its_services_and_its_models(asked):
    for service in ("", INFERENCE, MODEL):
        assert check_health(asked, service) == SERVING, service


def health_of_what_is_not_there_is_not_found(asked):
    try:
        check_health(asked, "nobody")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND
    else:
        raise AssertionError("an unknown service has a health")


def health_can_be_watched(asked):
    unknown = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    with grpc.insecure_channel(asked.address) as channel:
        for service, status in (("", SERVING), (MODEL, SERVING), ("nobody", unknown)):
            request = health_pb2.HealthCheckRequest(service=service)
            watch = health_pb2_grpc.HealthStub(channel).Watch(request, timeout=WAIT_S)
            assert next(watch).status == status, service
            watch.cancel()


def reflection_lists_every_service(asked):
    with grpc.insecure_channel(asked.address) as channel:
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {INFERENCE, PARITY, HEALTH, REFLECTION} <= services


def reflection_describes_every_method_of_every_service(asked):
    with grpc.insecure_channel(asked.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        for name in database.get_services():
            assert pool.FindServiceByName(name).methods, name
        methods = {one.name for one in pool.FindServiceByName(INFERENCE).methods}
        assert {
            "ServerLive",
            "ServerReady",
            "ModelReady",
            "ServerMetadata",
            "ModelMetadata",
            "ModelInfer",
            "ModelStreamInfer",
            "ModelConfig",
            "ModelStatistics",
            "RepositoryIndex",
            "RepositoryModelLoad",
            "RepositoryModelUnload",
        } <= methods


def model_is_asked_with_nothing_but_what_reflection_describes(asked):
    with grpc.insecure_channel(asked.address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        assert call_described(channel, pool, INFERENCE, "ServerLive").live
        raw = asked.images[:5].tobytes()
        image = {"name": "image", "datatype": "UINT8", "shape": (5, *SHAPE)}
        answer = call_described(
            channel,
            pool,
            INFERENCE,
            "ModelInfer",
            model_name=MODEL,
            inputs=[image],
            raw_input_contents=[raw],
        )
        typed = {**image, "contents": {"uint_contents": list(raw)}}
        again = call_described(
            channel, pool, INFERENCE, "ModelInfer", model_name=MODEL, inputs=[typed]
        )
    (place,) = (place for place, one in enumerate(answer.outputs) if one.name == "logits")
    logits = np.frombuffer(answer.raw_output_contents[place], np.float32).reshape(5, -1)
    np.testing.assert_allclose(logits, asked.logits[:5], atol=1e-3)
    assert again.raw_output_contents == answer.raw_output_contents


def parity_is_told_to_who_only_has_reflection(asked):
    with grpc.insecure_channel(asked.address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        (version,) = call_described(channel, pool, PARITY, "GetParity").versions
    assert version.model == MODEL
    assert version.self_check.report.passed


def symbol_that_is_not_there_is_not_described(asked):
    with grpc.insecure_channel(asked.address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        try:
            pool.FindServiceByName("inference.Nothing")
        except KeyError:
            return
    raise AssertionError("an unknown service was described")


def newer_reflection_is_refused_so_that_clients_ask_for_this_one(asked):
    with grpc.insecure_channel(asked.address) as channel:
        newer = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
        call: Any = channel.stream_stream(newer)
        try:
            next(call(iter([b""]), timeout=WAIT_S))
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNIMPLEMENTED
        else:
            raise AssertionError("grpc.reflection.v1 answered; then it should be listed")
