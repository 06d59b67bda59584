import io
import threading

import grpc
import numpy as np
import pytest
from PIL import Image

from protos import inference_pb2 as pb
from service.client import Client
from service.errors import ServerError


def refusal(call, *arguments, **options):
    with pytest.raises(ServerError) as caught:
        call(*arguments, **options)
    return caught.value.code, str(caught.value)


def test_requests_take_the_connections_in_turn(serve, model, tiny):
    peers = []

    def infer(request, context):
        peers.append(context.peer())
        return model.infer(request, context)

    with Client(serve(ModelMetadata=model.about, ModelInfer=infer), channels=3) as client:
        for _ in range(12):
            client.predict(tiny.images(1), model="tiny")

    assert len(set(peers)) == 3
    assert all(3 <= peers.count(peer) <= 5 for peer in peers)  # metadata took a turn or two


def test_parts_of_a_call_that_failed_are_cancelled_at_the_server(serve, model, tiny):
    ended = threading.Event()
    going = threading.Semaphore(0)

    def infer(request, context):
        if request.model_version and request.inputs[0].shape[0] == 8:
            assert going.acquire(timeout=30)
            context.abort(grpc.StatusCode.INTERNAL, "internal error, request 5f2c")
        if request.model_version:
            context.add_callback(ended.set)
            going.release()
            assert ended.wait(30)
        return model.infer(request, context)

    with Client(serve(ModelMetadata=model.about, ModelInfer=infer)) as client:
        assert refusal(client.predict, tiny.images(8 + 8 + 1), model="tiny") == (
            "INTERNAL",
            "internal error, request 5f2c",
        )
        assert ended.wait(30)


def test_closed_client_asks_nothing(serve, model, tiny):
    client = Client(serve(**model.methods()))
    client.predict(tiny.images(1), model="tiny")
    client.close()

    with pytest.raises(ValueError, match="closed"):
        client.predict(tiny.images(1), model="tiny")


def test_our_own_server_answers_all_that_this_client_asks(listen, rpc, tiny):
    images = tiny.images(20)  # the server takes 8 in one request
    files = []
    for image in images:
        files.append(io.BytesIO())
        Image.fromarray(image[:, :, 0]).save(files[-1], "PNG")

    with Client(listen(rpc), coalesce_rows=4) as client:
        client.wait_ready(30)
        answers = [
            client.predict(images, model="tiny"),
            client.predict_pictures([file.getvalue() for file in files], model="tiny"),
        ]
        assert [(one.name, one.state) for one in client.models()] == [("tiny", "READY")]
        assert client.metadata("tiny").versions == ["1"]
        assert client.config("tiny").name == "tiny"
        assert [one.inference_count for one in client.statistics("tiny")] == [40]
        assert [one.model for one in client.parity().versions] == ["tiny"]
        assert refusal(client.load, "tiny")[0] == "PERMISSION_DENIED"
        assert refusal(client.predict, images[:, :1], model="tiny")[0] == "INVALID_ARGUMENT"

    for answer in answers:
        assert (answer.version, answer.labels) == ("1", tiny.labels)
        np.testing.assert_array_equal(answer.logits, tiny.logits(images))
        np.testing.assert_allclose(answer.probabilities.astype(float).sum(axis=1), 1, rtol=1e-6)


def test_message_types_are_not_in_the_pool_that_other_clients_use():
    from google.protobuf import descriptor_pool

    with pytest.raises(KeyError):
        descriptor_pool.Default().FindMessageTypeByName(pb.ModelInferRequest.DESCRIPTOR.full_name)
