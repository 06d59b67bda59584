"""Tools that know only gRPC's own services: health probes, and reflection as grpcurl asks it."""

import pytest

FRONTS = ("grpcio", "native")
pytestmark = pytest.mark.slow


def test_health_probes_and_reflection_need_nothing_of_ours(serve, ask):
    ask("plain", serve())
