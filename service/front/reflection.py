"""Reflection: what is served, described from the files of every service. grpcio's own servicer."""

from collections.abc import Sequence
from functools import cache

from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from protos import pool

REQUEST = reflection_pb2.ServerReflectionRequest


@cache
def servicer(services: Sequence[str]) -> reflection.aio.ReflectionServicer:
    """Return who describes these services, by their full names."""
    for module in (health_pb2, reflection_pb2):  # which are in protobuf's pool, not in ours
        pool.Default().AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return reflection.aio.ReflectionServicer(services, pool=pool.Default())
