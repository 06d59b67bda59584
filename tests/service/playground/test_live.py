import asyncio

import pytest

from protos import inference_pb2 as pb
from protos import parity_pb2
from service.aio_client import AsyncClient
from service.playground import live


def ask(loop, address, count, *, between=None):
    """Return the first states of a server."""

    async def main():
        found, stopped = [], asyncio.Event()
        async with AsyncClient(address) as client:
            async for state in live.states(client, stopped=stopped):
                found.append(state)
                if between:
                    await between(client, len(found))
                if len(found) == count:
                    stopped.set()
        return found

    return asyncio.run_coroutine_threadsafe(main(), loop).result(60)


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(live, "PAUSE_S", 0.05)


def test_models_load_and_parity_of_a_server_are_shown(loop, rpc, listen, tiny):
    async def between(client, turn):
        if turn == 1:
            await client.predict(tiny.images(6), model="tiny")

    first, second = ask(loop, listen(rpc), 2, between=between)

    assert first["up"] and second["up"]
    assert second["models"] == [
        {"name": "tiny", "versions": [{"version": "1", "state": "READY", "reason": ""}]}
    ]
    assert "rows_per_s" not in first["load"][0]
    (load,) = second["load"]
    assert (load["rows"], load["requests"], load["refused"]) == (6, 1, 0)
    assert load["batch_rows"] == 6
    assert load["rows_per_s"] == pytest.approx(6 * load["requests_per_s"])
    assert load["compute_ms"] > 0
    (parity,) = second["parity"]
    assert [one["variant"] for one in parity["reports"]] == ["onnx-float32", "self-check"]
    assert all(one["passed"] for one in parity["reports"])
    assert parity["check"]["cpu"]
    assert "live" not in parity


def test_a_server_that_is_away_is_one_sentence(loop):
    first, second = ask(loop, "127.0.0.1:1", 2)

    assert first == second
    assert not first["up"]
    assert first["reason"].startswith("no server answers at 127.0.0.1:1; start one with")


def statistics(requests, rows, *, queue_s=0.0, compute_s=0.0, executions=1):
    one = pb.ModelStatistics(
        name="tiny", version="1", inference_count=rows, execution_count=executions
    )
    one.inference_stats.success.count = requests
    one.inference_stats.queue.ns = round(queue_s * 1e9)
    one.inference_stats.compute_infer.ns = round(compute_s * 1e9)
    return one


def load(before, now, seconds=2.0):
    earlier, later = ({("tiny", "1"): one} if one else {} for one in (before, now))
    return live._load(earlier, later, seconds)[0]


def test_rates_are_of_what_was_counted_since():
    found = load(
        statistics(10, 100, queue_s=1, compute_s=2, executions=20),
        statistics(14, 300, queue_s=1.4, compute_s=2.2, executions=30),
    )

    assert found["rows_per_s"] == 100
    assert found["requests_per_s"] == 2
    assert found["waiting"] == pytest.approx(0.2)  # 0.4 s of waiting in 2 s
    assert found["queue_ms"] == pytest.approx(100)
    assert found["compute_ms"] == pytest.approx(50)
    assert found["batch_rows"] == 20


@pytest.mark.parametrize(
    ("before", "now", "seconds"),
    [
        (None, statistics(4, 4), 2.0),
        (statistics(9, 9), statistics(4, 4), 2.0),  # it was started again
        (statistics(4, 4), statistics(5, 5), 0.0),
    ],
)
def test_there_are_no_rates_without_two_counts_to_compare(before, now, seconds):
    found = load(before, now, seconds)

    assert "rows_per_s" not in found
    assert found["rows"] == now.inference_count


def test_a_second_without_requests_has_no_mean_times():
    found = load(statistics(4, 4), statistics(4, 4))

    assert found["rows_per_s"] == 0
    assert not {"queue_ms", "compute_ms", "batch_rows"} & set(found)


def test_versions_of_a_model_are_in_falling_order():
    found = [pb.RepositoryIndexResponse.ModelIndex(name="b", version=one) for one in ("9", "10")]
    found.append(pb.RepositoryIndexResponse.ModelIndex(name="a", state="UNAVAILABLE", reason="no"))

    first, second = live._models(found)

    assert first == {
        "name": "a",
        "versions": [{"version": "", "state": "UNAVAILABLE", "reason": "no"}],
    }
    assert [one["version"] for one in second["versions"]] == ["10", "9"]


def test_live_parity_is_shown_once_a_shadow_has_reported():
    one = parity_pb2.VersionParity(model="tiny", version="1")
    one.live.window_s = 60
    nothing = live.parity_of(one)["live"]
    one.live.verdict, one.live.failure = parity_pb2.LIVE_VERDICT_FAILED, "a flip"
    one.live.window.rows, one.live.window.agreed = 4, 3
    one.live.window.max_logit, one.live.budget.precision = 0.5, "int8"
    failed = live.parity_of(one)["live"]

    assert (nothing["verdict"], nothing["agreement"], nothing["apart"]) == ("unknown", None, None)
    assert (failed["verdict"], failed["agreement"], failed["apart"]) == ("failed", 0.75, 0.5)
    assert failed["failure"] == "a flip"
    assert (nothing["integers"], failed["integers"]) == (False, True)
