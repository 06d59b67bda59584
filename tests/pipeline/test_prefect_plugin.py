import asyncio
from types import SimpleNamespace

import pytest

from pipeline import prefect_plugin


class FakeClient:
    """Answers as a Prefect server with these FLOW/DEPLOYMENT names would."""

    def __init__(self, *full_names):
        self._names = [name.split("/") for name in full_names]

    async def read_deployments(self, deployment_filter):
        wanted = deployment_filter.name.any_
        return [SimpleNamespace(flow_id=flow) for flow, name in self._names if name in wanted]

    async def read_flow(self, flow_id):
        return SimpleNamespace(name=flow_id)


def full_name(name, *deployments):
    return asyncio.run(prefect_plugin.full_name(FakeClient(*deployments), name))


def test_a_bare_name_is_the_one_deployment_of_that_name():
    assert full_name("nightly", "train-export/nightly", "other/weekly") == "train-export/nightly"


def test_a_full_name_is_left_as_it_is():
    assert full_name("a/b", "a/b", "c/b") == "a/b"


def test_a_bare_name_that_nobody_has_is_looked_up_as_its_own_flow():
    assert full_name("train-export") == "train-export/train-export"


def test_a_bare_name_that_two_flows_have_is_refused_with_both():
    with pytest.raises(ValueError, match="names 2 deployments: a/nightly, b/nightly; choose one"):
        full_name("nightly", "b/nightly", "a/nightly")
