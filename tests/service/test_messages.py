import numpy as np
import pytest

from protos import inference_pb2 as pb
from service.client import Client
from service.errors import ServerError
from service.messages import BATCH_ROWS, PICTURE_BYTES


def refusal(call, *arguments, **options):
    with pytest.raises(ServerError) as caught:
        call(*arguments, **options)
    return caught.value.code, str(caught.value)


# Images


@pytest.mark.parametrize("rows", [1, 8, 9, 25, 100])
def test_images_of_any_number_are_answered_in_their_order(client, model, tiny, rows):
    images = tiny.images(rows)  # the server takes 8 in one request

    answer = client.predict(images, model="tiny")

    assert (answer.model, answer.version, answer.labels) == ("tiny", "1", ("a", "b", "c"))
    np.testing.assert_array_equal(answer.logits, tiny.logits(images))
    assert sorted(model.rows, reverse=True) == [8] * (rows // 8) + [rows % 8] * (rows % 8 > 0)


def test_images_that_are_a_view_are_sent_row_major(client, tiny):
    turned = tiny.images(4).transpose(0, 2, 1, 3)

    np.testing.assert_array_equal(client.predict(turned, model="t").logits, tiny.logits(turned))


def test_images_of_another_dtype_are_refused_and_not_rounded_to_zero(client, model, tiny):
    for _ in range(2):  # also when the metadata are remembered
        with pytest.raises(ValueError, match="images is float32, tiny takes uint8; convert it"):
            client.predict(tiny.images(2).astype(np.float32) / 255, model="tiny")
    assert model.asked == []


def test_server_that_says_neither_limit_nor_labels_gets_batches_of_a_fixed_size(
    client, model, tiny
):
    model.properties = {}

    assert client.predict(tiny.images(BATCH_ROWS + 1), model="tiny").labels == ()
    assert model.rows == [BATCH_ROWS, 1]


@pytest.mark.parametrize(
    ("row", "output", "most"),
    [((512, 512), [1], 3), ((4,), [512, 128], 3), ((4,), [-1, 512, 128], 8)],
)
def test_no_request_and_no_answer_is_over_the_message_limit(serve, model, tiny, row, output, most):
    def about(request, context):
        response = model.about(request, context)
        response.outputs.add(name="logits", datatype="FP32", shape=[-1, *output])
        return response

    images = np.arange(8 * np.prod(row)).astype(np.uint8).reshape(8, *row)
    with Client(serve(ModelMetadata=about, ModelInfer=model.infer), max_message_mib=1) as client:
        answer = client.predict(images, model="tiny")

    assert max(model.rows) == most
    np.testing.assert_array_equal(answer.logits, tiny.logits(images.reshape(8, -1)[:, :4]))


# Picture files


def test_pictures_are_sent_as_they_are(client, model, tiny, tmp_path):
    images = tiny.images(11)
    files = [image.tobytes() for image in images]
    for number, content in enumerate(files[:2]):
        (tmp_path / f"{number}.png").write_bytes(content)
    files[:2] = [tmp_path / "0.png", str(tmp_path / "1.png")]

    answer = client.predict_pictures(files, model="tiny")

    np.testing.assert_array_equal(answer.logits, tiny.logits(images))
    assert model.asked == [("", 8), ("1", 3)]


def test_big_pictures_are_not_put_into_one_request(serve, model):
    rows = []

    def infer(request, context):
        rows.append(request.inputs[0].shape[0])
        return model.respond(np.zeros((rows[-1], 3), np.float32))

    half = bytes(PICTURE_BYTES // 2 - 4)
    with Client(serve(ModelMetadata=model.about, ModelInfer=infer)) as client:
        client.predict_pictures([half, half, half + b"1", half, half * 2], model="tiny")

    assert sorted(rows) == [1, 1, 1, 2]


# Responses


def output(**fields):
    return pb.ModelInferResponse.InferOutputTensor(name="logits", datatype="FP32", **fields)


@pytest.mark.parametrize(
    ("response", "code", "sentence"),
    [
        (
            pb.ModelInferResponse(
                outputs=[output(shape=[2, 3])],
                raw_output_contents=[bytes(24)],
            ),
            "INTERNAL",
            "the server answered 3 rows with 24 bytes as output 'logits' of shape [2, 3] float32",
        ),
        (
            pb.ModelInferResponse(
                outputs=[output(shape=[3, 3])],
                raw_output_contents=[b"1234"],
            ),
            "INTERNAL",
            "the server answered 3 rows with 4 bytes as output 'logits' of shape [3, 3] float32",
        ),
        (
            pb.ModelInferResponse(outputs=[output()]),
            "UNIMPLEMENTED",
            "the server did not answer in raw_output_contents",
        ),
    ],
)
def test_answer_without_a_row_for_each_image_is_refused(
    serve, model, tiny, response, code, sentence
):
    address = serve(ModelMetadata=model.about, ModelInfer=lambda request, context: response)
    with Client(address) as client:
        assert refusal(client.predict, tiny.images(3), model="tiny") == (code, sentence)


def test_model_of_a_datatype_that_this_client_does_not_know_is_not_asked(serve, tiny):
    about = pb.ModelMetadataResponse(name="tiny")
    about.inputs.add(name="text", datatype="BYTES", shape=[-1, 1])

    with Client(serve(ModelMetadata=lambda request, context: about)) as client:
        code, sentence = refusal(client.predict, tiny.images(1), model="tiny")

    assert code == "UNIMPLEMENTED"
    assert sentence.startswith("the model has the datatype BYTES, this client knows ")
