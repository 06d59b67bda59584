import threading
from types import SimpleNamespace

import numpy as np
import pytest

from protos import inference_pb2, parity_pb2
from service.client import BATCH_ROWS, Client
from service.errors import ServerError
from service.rpc import SERVICES, Rpc

NOBODY = "127.0.0.1:1"


@pytest.fixture
def client(listen, rpc):
    with Client(listen(rpc)) as client:
        yield client


class Fake:
    """An Rpc with canned answers: a message, or a function of the request's bytes."""

    def __init__(self, **answers):
        self._answers = {
            f"/{SERVICES[name == 'GetParity']}/{name}": answer for name, answer in answers.items()
        }
        self.methods = {path: SimpleNamespace(computes=False) for path in self._answers}

    def call(self, path, content):
        answer = self._answers[path]
        message = answer(content) if callable(answer) else answer
        return message.SerializeToString()


def about(**properties):
    metadata = inference_pb2.ModelMetadataResponse(name="tiny", properties=properties)
    metadata.inputs.add(name="image", datatype="UINT8", shape=[-1, 2, 2, 1])
    return metadata


class Counting:
    """A ModelInfer that answers how many rows each request had, as version 7."""

    def __init__(self):
        self.rows = []
        self.versions = []

    def __call__(self, content):
        request = inference_pb2.ModelInferRequest.FromString(content)
        rows = request.inputs[0].shape[0]
        self.rows.append(rows)
        self.versions.append(request.model_version)
        response = inference_pb2.ModelInferResponse(model_name="tiny", model_version="7")
        response.outputs.add(name="logits", datatype="FP32", shape=[rows, 1])
        response.raw_output_contents.append(np.full((rows, 1), rows, np.float32).tobytes())
        return response


def refusal(call, *arguments, **options):
    with pytest.raises(ServerError) as caught:
        call(*arguments, **options)
    return caught.value.code, str(caught.value)


@pytest.mark.parametrize("rows", [1, 8, 9, 25])
def test_images_of_any_number_are_answered_in_their_order(client, tiny, rows):
    images = tiny.images(rows)  # the server takes 8 in one request

    answer = client.predict(images, model="tiny")

    assert (answer.model, answer.version, answer.labels) == ("tiny", "1", tiny.labels)
    np.testing.assert_allclose(answer.logits, tiny.logits(images), rtol=1e-6)
    np.testing.assert_allclose(answer.probabilities.sum(axis=1), 1, rtol=1e-6)
    assert answer.logits.dtype == np.float32


def test_images_that_are_a_view_are_sent_row_major(client, tiny):
    images = tiny.images(4)

    turned = client.predict(images.transpose(0, 2, 1, 3), model="tiny")

    np.testing.assert_allclose(turned.logits, tiny.logits(images.transpose(0, 2, 1, 3)), rtol=1e-6)


def test_no_images_are_refused_before_anything_is_sent():
    with Client(NOBODY) as client, pytest.raises(ValueError, match="images has no rows"):
        client.predict(np.zeros((0, 2, 2, 1), np.uint8), model="tiny")


def test_version_that_answered_first_is_kept_for_the_rest(listen, tiny):
    infer = Counting()
    with Client(listen(Fake(ModelMetadata=about(max_batch_rows="3"), ModelInfer=infer))) as client:
        answer = client.predict(tiny.images(7), model="tiny")

    assert infer.rows == [3, 3, 1]
    assert infer.versions == ["", "7", "7"]
    assert answer.version == "7"
    assert answer.outputs["logits"].ravel().tolist() == [3] * 6 + [1]


def test_server_that_says_neither_limit_nor_labels_gets_batches_of_a_fixed_size(listen, tiny):
    infer = Counting()
    with Client(listen(Fake(ModelMetadata=about(), ModelInfer=infer))) as client:
        answer = client.predict(tiny.images(BATCH_ROWS + 1), model="tiny")

    assert infer.rows == [BATCH_ROWS, 1]
    assert answer.labels == ()


def test_models_metadata_and_parity_are_the_servers(client):
    assert [(model.name, model.state) for model in client.models()] == [("tiny", "READY")]
    assert client.metadata("tiny", "1").versions == ["1"]
    assert [one.model for one in client.parity().versions] == ["tiny"]
    assert client.parity("tiny", "1") == client.parity()
    assert isinstance(client.parity(), parity_pb2.GetParityResponse)


def test_refusal_carries_the_servers_code_and_sentence(client, tiny):
    assert refusal(client.metadata, "none") == (
        "NOT_FOUND",
        "Request for unknown model: 'none' is not found",
    )
    assert refusal(client.predict, tiny.images(1), model="tiny", version="x")[0] == (
        "INVALID_ARGUMENT"
    )
    assert refusal(client.predict, tiny.images(1)[:, :1], model="tiny")[0] == "INVALID_ARGUMENT"
    assert refusal(client.parity, version="1") == (
        "INVALID_ARGUMENT",
        "version is '1' without a model; name the model as well",
    )


def test_server_that_is_not_there_is_said_to_be_so():
    with Client(NOBODY) as client:
        assert refusal(client.models) == (
            "UNAVAILABLE",
            f"no server answers at {NOBODY}; start one with: "
            "serve-export serve --repository models",
        )


def test_unavailable_model_is_not_taken_for_an_absent_server(make_bundle, load, listen):
    make_bundle(version=2).joinpath("model.onnx").unlink()
    with Client(listen(Rpc(load(make_bundle())))) as client:
        assert refusal(client.metadata, "tiny", "2") == (
            "UNAVAILABLE",
            "Request for unknown model: 'tiny' version 2 is not at ready state",
        )


def test_call_that_the_server_does_not_know_is_refused_with_its_code(listen):
    with Client(listen(Fake(ServerLive=inference_pb2.ServerLiveResponse()))) as client:
        assert refusal(client.models)[0] == "UNIMPLEMENTED"


def test_ready_server_is_waited_for(client):
    client.wait_ready(0)


def test_server_that_becomes_ready_is_waited_for(listen):
    answers = iter([False, False, True])
    fake = Fake(ServerReady=lambda content: inference_pb2.ServerReadyResponse(ready=next(answers)))

    with Client(listen(fake)) as client:
        client.wait_ready(30)

    assert list(answers) == []


def test_wait_ends_with_what_the_server_last_said(listen):
    fake = Fake(ServerReady=inference_pb2.ServerReadyResponse(ready=False))
    address = listen(fake)

    with Client(address) as client:
        assert refusal(client.wait_ready, 0.1) == (
            "UNAVAILABLE",
            f"{address} is not ready after 0.1 s: it answers that it is not ready",
        )
    with Client(NOBODY) as client:
        assert (
            f"{NOBODY} is not ready after 0 s: no server answers"
            in refusal(client.wait_ready, 0)[1]
        )


def test_call_that_takes_too_long_ends_with_its_deadline(listen):
    done = threading.Event()

    def slow(content):
        done.wait(30)
        return inference_pb2.ModelInferResponse()

    fake = Fake(ModelMetadata=about(), ModelInfer=slow)
    fake.methods[f"/{SERVICES[0]}/ModelInfer"] = SimpleNamespace(computes=True)
    with Client(listen(fake), timeout_s=0.3) as client:
        code, message = refusal(client.predict, np.zeros((1, 2, 2, 1), np.uint8), model="tiny")
        done.set()

    assert (code, message) == ("DEADLINE_EXCEEDED", "Deadline Exceeded")


def test_images_of_another_dtype_are_refused_and_not_rounded_to_zero(client, tiny):
    with pytest.raises(ValueError, match="images is float32, tiny takes uint8; convert it"):
        client.predict(tiny.images(2).astype(np.float32) / 255, model="tiny")
