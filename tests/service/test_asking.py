import asyncio
import math
import threading
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from protos import model_config_pb2, parity_pb2
from service import messages
from service.asking import PARTS_IN_FLIGHT, Asker
from service.client import Client
from service.connection import Connection
from service.errors import ServerError

NOBODY = "127.0.0.1:1"
CODE = grpc.StatusCode


def refusal(call, *arguments, **options):
    with pytest.raises(ServerError) as caught:
        call(*arguments, **options)
    return caught.value.code, str(caught.value)


# In parts


@pytest.mark.parametrize("images", [np.zeros((0, 2, 2, 1), np.uint8), np.uint8(3), []])
def test_no_images_are_refused_before_anything_is_sent(images):
    with Client(NOBODY) as client, pytest.raises(ValueError, match="images has no rows"):
        client.predict(images, model="tiny")


def test_version_that_answered_first_is_kept_for_the_rest(client, model, tiny):
    model.version = "7"

    assert client.predict(tiny.images(20), model="tiny").version == "7"
    assert sorted(model.asked) == [("", 8), ("7", 4), ("7", 8)]
    assert client.predict(tiny.images(1), model="tiny", version="3").version == "3"


class Counting:
    """A wire that answers in this process, and counts what is on its way."""

    def __init__(self, model, *, refused=()):
        self._model = model
        self._refused = refused
        self.flying = []
        self.most = 0
        self.cancelled = 0

    async def call(self, request, response, timeout_s):
        method = self._model.about if response is pb.ModelMetadataResponse else self._model.infer
        return method(request, None)

    def start(self, request, timeout_s):
        self.flying.append(request)
        self.most = max(self.most, len(self.flying))
        return SimpleNamespace(
            response=partial(self._respond, request), cancel=partial(self._cancel, request)
        )

    async def _respond(self, request):
        self.flying.remove(request)
        if request.inputs[0].shape[0] in self._refused:
            raise ServerError("internal error, request 5f2c", code="INTERNAL")
        return await self.call(request, None, 0)

    def _cancel(self, request):
        self.flying.remove(request)
        self.cancelled += 1


def connection(**options):
    plain: dict[str, Any] = {
        "timeout_s": 30,
        "channels": 1,
        "coalesce_rows": 0,
        "max_message_mib": 64,
    }
    plain |= {"wait_for_ready": False, "tls": None, "token": None}
    return Connection(address="server:1", **plain | options)


def test_only_so_many_parts_of_a_call_are_in_flight(model, tiny):
    wire: Any = Counting(model)
    images = tiny.images(8 * 20)

    answer = asyncio.run(Asker(connection(), wire).predict(images, model="tiny"))

    assert wire.most == PARTS_IN_FLIGHT
    np.testing.assert_array_equal(answer.logits, tiny.logits(images))


def test_part_that_is_refused_ends_the_others(model, tiny):
    wire: Any = Counting(model, refused=[3])
    images = tiny.images(8 * 3 + 3)  # 3 parts of 8, and one of 3 when three are in flight

    code, _ = refusal(lambda: asyncio.run(Asker(connection(), wire).predict(images, model="tiny")))
    assert (code, wire.cancelled, wire.flying) == ("INTERNAL", 0, [])

    wire = Counting(model, refused=[8])
    code, _ = refusal(lambda: asyncio.run(Asker(connection(), wire).predict(images, model="tiny")))
    assert (code, wire.cancelled, wire.flying) == ("INTERNAL", 2, [])


class Away(Counting):
    """A wire to a balancer that has no server for a while."""

    def __init__(self, model, *, refusals, sentence="no healthy upstream", **options):
        super().__init__(model, **options)
        self.refusals, self.sentence = refusals, sentence
        self.slept = []

    async def call(self, request, response, timeout_s):
        if self.refusals:
            self.refusals -= 1
            raise ServerError(self.sentence, code="UNAVAILABLE")
        return await super().call(request, response, timeout_s)

    async def join(self, request, max_rows, timeout_s):
        return messages.read(await self.call(request, None, timeout_s), 1)

    async def sleep(self, seconds):
        self.slept.append(seconds)


@pytest.mark.parametrize("coalesce_rows", [0, 8])
@pytest.mark.parametrize("known", [True, False])
def test_who_waits_asks_again_while_no_server_is_available(model, tiny, known, coalesce_rows):
    wire: Any = Away(model, refusals=0)
    asker = Asker(connection(wait_for_ready=True, coalesce_rows=coalesce_rows), wire)
    images = tiny.images(8 * 3 if not coalesce_rows else 1)
    if known:
        asyncio.run(asker.predict(images, model="tiny"))
    wire.refusals = 7

    answer = asyncio.run(asker.predict(images, model="tiny"))

    np.testing.assert_array_equal(answer.logits, tiny.logits(images))
    assert len(wire.slept) >= 6


def test_part_of_a_call_that_waits_is_sent_again(model, tiny):
    wire: Any = Away(model, refusals=0)
    images = tiny.images(8 * 3)
    sent = wire.start

    def start(request, timeout_s):
        wire.refusals = 2
        return sent(request, timeout_s)

    wire.start = start
    answer = asyncio.run(Asker(connection(wait_for_ready=True), wire).predict(images, model="tiny"))

    np.testing.assert_array_equal(answer.logits, tiny.logits(images))


@pytest.mark.parametrize(
    ("wait_for_ready", "sentence"),
    [(False, "no healthy upstream"), (True, "version 2 is not at ready state")],
)
def test_who_does_not_wait_or_asks_for_what_has_left_is_told_at_once(
    model, wait_for_ready, sentence
):
    wire: Any = Away(model, refusals=1, sentence=sentence)
    asker = Asker(connection(wait_for_ready=wait_for_ready), wire)

    assert refusal(lambda: asyncio.run(asker.metadata("tiny"))) == ("UNAVAILABLE", sentence)


def test_waiting_ends_with_the_time_that_the_client_gives(model):
    wire: Any = Away(model, refusals=10**9)
    asker = Asker(connection(wait_for_ready=True, timeout_s=0.4), wire)

    code, _ = refusal(lambda: asyncio.run(asker.metadata("tiny")))

    assert (code, wire.slept) == ("UNAVAILABLE", [])


def test_what_changes_a_server_is_not_sent_again(model):
    wire: Any = Away(model, refusals=10**9)
    asker = Asker(connection(wait_for_ready=True), wire)

    assert refusal(lambda: asyncio.run(asker.load("tiny")))[0] == "UNAVAILABLE"
    assert wire.slept == []


def test_parts_are_sent_without_waiting_for_the_one_before(serve, model, tiny):
    together = threading.Barrier(PARTS_IN_FLIGHT, timeout=30)

    def infer(request, context):
        if request.model_version:  # after the first, which goes alone
            together.wait()
        return model.infer(request, context)

    images = tiny.images(8 * (1 + 2 * PARTS_IN_FLIGHT))
    with Client(serve(ModelMetadata=model.about, ModelInfer=infer)) as client:
        answer = client.predict(images, model="tiny")

    np.testing.assert_array_equal(answer.logits, tiny.logits(images))


# What is remembered of a model


def test_metadata_are_asked_for_once(client, model, tiny):
    for seed in range(5):
        client.predict(tiny.images(3, seed=seed), model="tiny")

    assert model.metadata == ["", "1"]  # of the server's choice, and of the version that answered


def test_labels_are_those_of_the_version_that_answered(client, model, tiny):
    assert client.predict(tiny.images(1), model="tiny").labels == ("a", "b", "c")
    model.version, model.properties["labels"] = "2", '["x", "y", "z"]'

    answer = client.predict(tiny.images(1), model="tiny")

    assert (answer.version, answer.labels) == ("2", ("x", "y", "z"))


def test_limit_that_has_shrunk_is_asked_for_again(serve, model, tiny):
    def infer(request, context):
        if request.inputs[0].shape[0] > int(model.properties["max_batch_rows"]):
            context.abort(CODE.INVALID_ARGUMENT, "batch-size must be <= 2")
        return model.infer(request, context)

    with Client(serve(ModelMetadata=model.about, ModelInfer=infer)) as client:
        client.predict(tiny.images(8), model="tiny")
        model.properties["max_batch_rows"] = "2"

        answer = client.predict(tiny.images(8), model="tiny")

    np.testing.assert_array_equal(answer.logits, tiny.logits(tiny.images(8)))
    assert model.rows == [8, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (CODE.NOT_FOUND, "Request for unknown model: 'tiny' version 1 is not found"),
        (CODE.UNAVAILABLE, "'tiny' version 1 is not at ready state"),
    ],
)
def test_version_that_leaves_in_the_middle_is_asked_no_more(serve, model, tiny, code, message):
    def infer(request, context):
        response = model.infer(request, context)
        if request.model_version == "1":
            model.version = "2"
            context.set_trailing_metadata([("grpc-retry-pushback-ms", "-1")])
            context.abort(code, message)
        return response

    with Client(serve(ModelMetadata=model.about, ModelInfer=infer)) as client:
        answer = client.predict(tiny.images(20), model="tiny")

    assert answer.version == "2"
    np.testing.assert_array_equal(answer.logits, tiny.logits(tiny.images(20)))


def test_refused_images_are_not_sent_again(serve, refusing, model, tiny):
    infer = refusing(model.infer, code=CODE.INVALID_ARGUMENT)
    with Client(serve(ModelMetadata=model.about, ModelInfer=infer)) as client:
        assert refusal(client.predict, tiny.images(1), model="tiny") == (
            "INVALID_ARGUMENT",
            "Exceeds maximum queue size",
        )

    assert infer.calls == 1


def test_unknown_model_is_asked_for_once(serve, refusing, model, tiny):
    about = refusing(model.about, code=CODE.NOT_FOUND)
    with Client(serve(ModelMetadata=about)) as client:
        assert refusal(client.predict, tiny.images(1), model="none")[0] == "NOT_FOUND"
    assert about.calls == 1


@pytest.mark.parametrize("inputs", [0, 2])
def test_model_of_no_or_several_inputs_is_not_asked(serve, tiny, inputs):
    about = pb.ModelMetadataResponse(name="tiny")
    for number in range(inputs):
        about.inputs.add(name=f"image{number}", datatype="UINT8", shape=[-1, 2, 2, 1])

    with Client(serve(ModelMetadata=lambda request, context: about)) as client:
        assert refusal(client.predict, tiny.images(1), model="tiny") == (
            "UNIMPLEMENTED",
            f"tiny has {inputs} inputs, this client fills one",
        )


# Picture files


def test_pictures_refused_together_are_sent_one_by_one(serve, model, tiny):
    def infer(request, context):
        if request.inputs[0].shape[0] > 1:
            context.abort(CODE.INVALID_ARGUMENT, "the pictures have over 16000000 pixels")
        return model.infer(request, context)

    images = tiny.images(11)
    files = [image.tobytes() for image in images]
    with Client(serve(ModelMetadata=model.about, ModelInfer=infer)) as client:
        answer = client.predict_pictures(files, model="tiny")

    np.testing.assert_array_equal(answer.logits, tiny.logits(images))
    assert model.asked[0] == ("", 1)
    assert model.asked[1:] == [("1", 1)] * 10


def test_what_is_no_list_of_pictures_is_refused_before_anything_is_sent(tmp_path):
    with Client(NOBODY) as client:
        wrong: Any
        for wrong in ("a.png", tmp_path / "a.png", b"\x89PNG", []):
            with pytest.raises(ValueError, match="pictures is not a list of PNG or JPEG files"):
                client.predict_pictures(wrong, model="tiny")
        with pytest.raises(ValueError, match=r"none.png cannot be read: No such file"):
            client.predict_pictures([tmp_path / "none.png"], model="tiny")


# What else a server is asked


def test_what_is_asked_about_the_server_is_its_answer(serve):
    told = []

    def tell(response):
        def method(request, context):
            told.append((type(request).__name__, str(request).split()))
            return response

        return method

    ready = pb.RepositoryIndexResponse.ModelIndex(name="tiny", version="1", state="READY")
    about = pb.ModelMetadataResponse(name="tiny", versions=["1"])
    config = model_config_pb2.ModelConfig(name="tiny", max_batch_size=8)
    counted = pb.ModelStatistics(name="tiny", version="1", inference_count=3)
    parity = parity_pb2.GetParityResponse(
        versions=[parity_pb2.VersionParity(model="tiny", version="1")]
    )
    address = serve(
        RepositoryIndex=tell(pb.RepositoryIndexResponse(models=[ready])),
        ModelMetadata=tell(about),
        ModelConfig=tell(pb.ModelConfigResponse(config=config)),
        ModelStatistics=tell(pb.ModelStatisticsResponse(model_stats=[counted])),
        GetParity=tell(parity),
        RepositoryModelLoad=tell(pb.RepositoryModelLoadResponse()),
        RepositoryModelUnload=tell(pb.RepositoryModelUnloadResponse()),
    )
    with Client(address) as client:
        assert client.models() == [ready]
        assert client.metadata("tiny", "1") == about
        assert client.config("tiny", "1") == config
        assert client.statistics("tiny") == [counted]
        assert client.parity() == parity
        client.load("tiny")
        client.unload("tiny")

    assert told == [
        ("RepositoryIndexRequest", []),
        ("ModelMetadataRequest", ["name:", '"tiny"', "version:", '"1"']),
        ("ModelConfigRequest", ["name:", '"tiny"', "version:", '"1"']),
        ("ModelStatisticsRequest", ["name:", '"tiny"']),
        ("GetParityRequest", []),
        ("RepositoryModelLoadRequest", ["model_name:", '"tiny"']),
        ("RepositoryModelUnloadRequest", ["model_name:", '"tiny"']),
    ]


def ready(*answers):
    given = iter(answers)
    return lambda request, context: pb.ServerReadyResponse(ready=next(given, answers[-1]))


def test_ready_server_is_waited_for(serve):
    with Client(serve(ServerReady=ready(True))) as client:
        client.wait_ready(0)


def test_server_that_becomes_ready_is_waited_for(serve):
    with Client(serve(ServerReady=ready(False, False, True))) as client:
        client.wait_ready(30)


def test_wait_ends_with_what_the_server_last_said(serve):
    address = serve(ServerReady=ready(False))
    with Client(address) as client:
        assert refusal(client.wait_ready, 0.1) == (
            "UNAVAILABLE",
            f"{address} is not ready after 0.1 s: it answers that it is not ready",
        )
    with Client(NOBODY) as client:
        said = refusal(client.wait_ready, 0)[1]
        assert said.startswith(f"{NOBODY} is not ready after 0 s: no server answers at")


def test_server_that_lets_this_client_not_in_is_not_waited_for(serve, refusing):
    shut = refusing(ready(True), code=CODE.UNAUTHENTICATED)
    with Client(serve(ServerReady=shut)) as client:
        assert refusal(client.wait_ready, 30)[0] == "UNAUTHENTICATED"
    assert shut.calls == 1


# How long


def test_call_that_takes_too_long_ends_with_its_deadline(serve, held, model, tiny):
    gates = {"ModelInfer": held(model.infer), "ModelConfig": held(None)}
    address = serve(ModelMetadata=model.about, **gates)
    late = (
        "DEADLINE_EXCEEDED",
        f"{address} did not answer in time; it may be busy, or need a longer timeout_s",
    )
    with Client(address, timeout_s=0.3) as client:
        assert refusal(client.predict, tiny.images(1), model="tiny") == late
        assert refusal(client.config, "tiny") == late
    with Client(address) as client:
        assert refusal(client.predict, tiny.images(1), model="tiny", timeout_s=0.3) == late
        assert refusal(client.config, "tiny", timeout_s=0.1) == late
    for gate in gates.values():
        gate.open()


def test_timeout_of_a_call_is_for_all_its_requests_together(serve, model, tiny):
    left: list[float] = []

    def infer(request, context):
        left.append(context.time_remaining())
        if not request.model_version:
            time.sleep(0.4)  # what its work takes
        return model.infer(request, context)

    address = serve(ModelMetadata=model.about, ModelInfer=infer)
    with Client(address, timeout_s=900) as client:
        client.predict(tiny.images(9), model="tiny", timeout_s=3)
        assert left[1] < left[0] - 0.1 < 3  # gRPC rounds up, by some percent
        client.predict(tiny.images(9), model="tiny")
        assert all(one > 100 for one in left[2:])


# Sampled rows


def about(shape=(-1, 2, 2, 1), output=(-1, 3), **properties):
    response = pb.ModelMetadataResponse(
        name="tiny", properties={"parity.output": "logits", **properties}
    )
    response.inputs.add(name="image", datatype="UINT8", shape=shape)
    response.outputs.add(name="probabilities", datatype="FP32", shape=(-1, 9))
    response.outputs.add(name="logits", datatype="FP32", shape=output)
    return response


def rows_of(rows=2, **fields):
    usual = {
        "model": "tiny",
        "version": "1",
        "parent_sha256": "ab",
        "rows": rows,
        "input": bytes(range(4 * rows)),
        "output": np.arange(3 * rows, dtype=np.float32).tobytes(),
        "dropped": 7,
    }
    return parity_pb2.SampledRows(**{**usual, **fields})


def sampled(serve, answers, *described):
    """Return what a client makes of sampled rows, and how often it asked what they are of."""
    given = iter(described)
    asked = []

    def metadata(request, context):
        asked.append((request.name, request.version))
        return next(given, described[-1])

    address = serve(ModelMetadata=metadata, SampleTraffic=lambda request, context: iter(answers))
    with Client(address) as client:
        return list(client.sample()), len(asked)


def test_sampled_rows_are_arrays_of_the_model_s_kind(serve):
    (one, other), asked = sampled(serve, [rows_of(), rows_of(1)], about())

    assert (one.model, one.version, one.parent_sha256, one.dropped) == ("tiny", "1", "ab", 7)
    assert one.inputs.dtype == np.uint8
    assert one.inputs.tolist() == np.arange(8).reshape(2, 2, 2, 1).tolist()
    assert one.outputs.dtype == np.float32
    assert one.outputs.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert other.inputs.shape == (1, 2, 2, 1)
    assert not one.inputs.flags.writeable
    assert asked == 1


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((-1, 2, -1, 1), (2, 2, 2, 1)), ((-1, -1, -1, 1), (2, 4)), ((-1, 4), (2, 4)), ((-1,), (2,))],
)
def test_free_sizes_are_found_where_there_is_one_and_else_a_row_is_flat(serve, shape, expected):
    content = bytes(math.prod(expected))

    (one,), _ = sampled(serve, [rows_of(input=content)], about(shape))

    assert one.inputs.shape == expected


@pytest.mark.parametrize(
    ("answer", "described", "code"),
    [
        (rows_of(input=b"123"), about(), "INTERNAL"),
        (rows_of(output=b"123"), about(), "INTERNAL"),
        (rows_of(input=b"123"), about((-1, -1)), "INTERNAL"),
        (rows_of(0), about(), "INTERNAL"),
        (rows_of(), about((-1, 0)), "INTERNAL"),
        (rows_of(), about(**{"parity.output": "none"}), "UNIMPLEMENTED"),
    ],
)
def test_rows_that_do_not_fit_their_model_are_refused(serve, answer, described, code):
    with pytest.raises(ServerError) as caught:
        sampled(serve, [answer], described)

    assert caught.value.code == code


def test_rows_of_a_version_that_was_loaded_anew_are_read_as_what_it_is_now(serve):
    found, asked = sampled(serve, [rows_of(), rows_of(input=bytes(6))], about(), about((-1, 3)))

    assert [one.inputs.shape for one in found] == [(2, 2, 2, 1), (2, 3)]
    assert asked == 2


def test_rows_are_passed_over_whose_version_has_left(serve):
    def metadata(request, context):
        if request.version == "1":
            context.abort(CODE.UNAVAILABLE, "'tiny' version 1 is not at ready state")
        if request.version == "2":
            context.abort(CODE.NOT_FOUND, "'tiny' version 2 is not found")
        return about()

    def sample(request, context):
        for version in "123":
            yield rows_of(version=version)

    with Client(serve(ModelMetadata=metadata, SampleTraffic=sample)) as client:
        assert [one.version for one in client.sample()] == ["3"]


def test_report_and_watch_say_what_they_are_about(serve):
    told = []
    version = parity_pb2.VersionParity(model="tiny")

    def report(request, context):
        told.append(request)
        return parity_pb2.ReportShadowResponse()

    def watch(request, context):
        told.append(request)
        for _ in range(2):
            yield parity_pb2.GetParityResponse(versions=[version])

    figures = parity_pb2.ShadowFigures(rows=3)
    with Client(serve(ReportShadow=report, StreamParity=watch)) as client:
        client.report(figures, model="tiny", version="1", parent_sha256="ab")
        answers = list(client.watch_parity("tiny", "1"))

    assert told == [
        parity_pb2.ReportShadowRequest(
            model="tiny", version="1", parent_sha256="ab", figures=figures
        ),
        parity_pb2.GetParityRequest(model="tiny", version="1"),
    ]
    assert [list(answer.versions) for answer in answers] == [[version]] * 2


def test_stream_of_a_server_that_knows_none_or_is_not_there_says_so(serve, model):
    with Client(serve(**model.methods())) as client, pytest.raises(ServerError) as caught:
        next(client.sample())
    with Client(NOBODY) as client, pytest.raises(ServerError) as nobody:
        next(client.watch_parity())

    assert caught.value.code == "UNIMPLEMENTED"
    assert nobody.value.code == "UNAVAILABLE"
    assert str(nobody.value).startswith("no server answers at")


def test_stream_of_a_closed_client_is_refused(serve, model):
    client = Client(serve(**model.methods()))
    client.close()

    with pytest.raises(ValueError, match="closed"):
        next(client.sample())
