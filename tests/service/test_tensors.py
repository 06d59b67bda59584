import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import bundle_pb2, inference_pb2
from service import tensors
from service.errors import InvalidRequestError

SPEC = bundle_pb2.TensorSpec(name="image", datatype="UINT8", shape=[-1, 2, 2, 1])
OUTPUTS = [
    bundle_pb2.TensorSpec(name=name, datatype="FP32", shape=[-1, 3])
    for name in ("probabilities", "logits")
]


def changed(infer, tiny, rows=2, **fields):
    """A good request for `rows` images, its input's fields replaced by `fields`."""
    request = infer(tiny.images(rows))
    shape = fields.pop("shape", None)
    if shape is not None:
        request.inputs[0].shape[:] = shape
    for name, value in fields.items():
        setattr(request.inputs[0], name, value)
    return request


def refusal(request, max_rows=8):
    with pytest.raises(InvalidRequestError) as caught:
        tensors.decode(request, SPEC, max_rows)
    return str(caught.value)


def test_rows_arrive_as_they_were_sent_and_cannot_be_written(infer, tiny):
    images = tiny.images(3)

    decoded = tensors.decode(infer(images), SPEC, 8)

    np.testing.assert_array_equal(decoded, images)
    assert decoded.dtype == np.uint8
    assert not decoded.flags.writeable


@pytest.mark.parametrize("datatype", sorted(tensors.DTYPE))
def test_every_datatype_is_decoded_little_endian_and_encoded_the_same(datatype):
    dtype = tensors.DTYPE[datatype]
    spec = bundle_pb2.TensorSpec(name="x", datatype=datatype, shape=[-1, 2])
    array = np.array([[1, 2], [3, 250]], dtype)
    request = inference_pb2.ModelInferRequest(raw_input_contents=[array.tobytes()])
    request.inputs.add(name="x", datatype=datatype, shape=[2, 2])
    response = inference_pb2.ModelInferResponse()

    decoded = tensors.decode(request, spec, 2)
    tensors.append_output(response, "y", decoded)

    assert decoded.dtype == dtype
    assert dtype.newbyteorder("<") == dtype
    np.testing.assert_array_equal(decoded, array)
    assert response.outputs[0] == inference_pb2.ModelInferResponse.InferOutputTensor(
        name="y", datatype=datatype, shape=[2, 2]
    )
    assert list(response.raw_output_contents) == [array.tobytes()]


def test_output_that_is_a_view_is_sent_row_major():
    response = inference_pb2.ModelInferResponse()
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    tensors.append_output(response, "y", array.T)

    assert response.outputs[0].shape == [3, 2]
    assert response.raw_output_contents[0] == array.T.tobytes()


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_inputs_than_one_is_refused(infer, tiny, count):
    request = infer(tiny.images(1))
    request.inputs.extend([request.inputs[0]] * count)
    del request.inputs[0]

    assert refusal(request) == (
        f"expected 1 inputs but got {count} inputs for model 'tiny'; its input is 'image'"
    )


def test_wrong_name_is_refused(infer, tiny):
    assert refusal(changed(infer, tiny, name="pixels")) == (
        "unexpected inference input 'pixels' for model 'tiny'; expected 'image'"
    )


def test_wrong_datatype_is_refused(infer, tiny):
    assert refusal(changed(infer, tiny, datatype="FP32")) == (
        "inference input 'image' data-type is 'FP32', but model 'tiny' expects 'UINT8'"
    )


@pytest.mark.parametrize(
    "shape",
    [
        [],
        [2],
        [2, 2, 2],
        [2, 2, 2, 1, 1],
        [2, 4, 1, 1],
        [-1, 2, 2, 1],
        [0, 2, 2, 1],
        [2, -2, -2, 1],
    ],
)
def test_wrong_wildcard_and_empty_shapes_are_refused(infer, tiny, shape):
    listed = ",".join(map(str, shape))

    assert refusal(changed(infer, tiny, shape=shape)) == (
        f"unexpected shape for input 'image' for model 'tiny'. Expected [-1,2,2,1], got [{listed}]"
    )


def test_batch_at_the_limit_is_taken_and_one_row_more_is_refused(infer, tiny):
    assert len(tensors.decode(infer(tiny.images(8)), SPEC, 8)) == 8
    assert refusal(infer(tiny.images(9))) == (
        "inference request batch-size must be <= 8 for 'tiny', got 9; "
        "split it into smaller requests"
    )


def test_shape_whose_product_would_overflow_is_refused_by_its_batch(infer, tiny):
    assert "batch-size must be <= 8" in refusal(changed(infer, tiny, shape=[2**62, 2, 2, 1]))


@pytest.mark.parametrize("length", [0, 7, 9])
def test_one_byte_less_or_more_is_refused(infer, tiny, length):
    request = changed(infer, tiny)
    request.raw_input_contents[0] = bytes(length)

    assert refusal(request) == (
        f"input byte size mismatch for input 'image' for model 'tiny'. Expected 8, got {length}"
    )


@pytest.mark.parametrize("count", [0, 2])
def test_another_number_of_raw_contents_than_one_is_refused(infer, tiny, count):
    request = changed(infer, tiny)
    request.raw_input_contents[:] = [bytes(8)] * count

    assert refusal(request) == (
        f"raw_input_contents has {count} entries for model 'tiny', expected 1"
    )


@pytest.mark.parametrize("with_raw", [True, False])
def test_contents_field_is_refused_even_when_it_is_empty(infer, tiny, with_raw):
    request = changed(infer, tiny)
    request.inputs[0].contents.SetInParent()
    if not with_raw:
        del request.raw_input_contents[:]

    assert refusal(request) == (
        "input 'image' for model 'tiny' is in its 'contents' field; send it in raw_input_contents"
    )


def asked(*names):
    request = inference_pb2.ModelInferRequest(model_name="tiny")
    for name in names:
        request.outputs.add(name=name)
    return tensors.requested(request, OUTPUTS)


def test_no_requested_output_means_all_and_others_keep_the_asked_order():
    assert asked() == ["probabilities", "logits"]
    assert asked("logits", "probabilities") == ["logits", "probabilities"]
    assert asked("logits") == ["logits"]


def test_unknown_output_is_refused():
    with pytest.raises(InvalidRequestError) as caught:
        asked("logits", "boxes")

    assert str(caught.value) == (
        "unexpected inference output 'boxes' for model 'tiny'; it has probabilities, logits"
    )


def test_output_that_is_asked_for_twice_is_refused():
    with pytest.raises(InvalidRequestError) as caught:
        asked("logits", "probabilities", "logits")

    assert str(caught.value) == ("inference output 'logits' is requested twice for model 'tiny'")


SIZES = st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4)
TENSORS = st.builds(
    inference_pb2.ModelInferRequest.InferInputTensor,
    name=st.just("image") | st.text(max_size=5),
    datatype=st.just("UINT8") | st.sampled_from(sorted(tensors.DTYPE)) | st.text(max_size=5),
    shape=st.builds(lambda rows: [rows, 2, 2, 1], SIZES) | st.lists(SIZES, max_size=5),
    contents=st.none()
    | st.builds(
        inference_pb2.InferTensorContents,
        uint_contents=st.lists(st.integers(0, 255), max_size=4),
    ),
)
REQUESTS = st.builds(
    inference_pb2.ModelInferRequest,
    model_name=st.text(max_size=5),
    inputs=st.lists(TENSORS, min_size=1, max_size=1) | st.lists(TENSORS, max_size=3),
    raw_input_contents=st.lists(
        st.sampled_from([4, 8, 16]).flatmap(lambda size: st.binary(min_size=size, max_size=size))
        | st.binary(max_size=20),
        max_size=2,
    ),
)


@given(REQUESTS)
def test_random_request_is_decoded_exactly_or_refused(request):
    try:
        decoded = tensors.decode(request, SPEC, 4)
    except InvalidRequestError as error:
        assert str(error)
        return

    assert decoded.shape == tuple(request.inputs[0].shape)
    assert 1 <= len(decoded) <= 4
    assert decoded.tobytes() == request.raw_input_contents[0]


@given(st.integers(1, 6), st.data())
def test_good_request_is_decoded_exactly(rows, data):
    content = data.draw(st.binary(min_size=rows * 4, max_size=rows * 4))
    request = inference_pb2.ModelInferRequest(raw_input_contents=[content])
    request.inputs.add(name="image", datatype="UINT8", shape=[rows, 2, 2, 1])

    assert tensors.decode(request, SPEC, 6).tobytes() == content


def test_output_asked_for_as_classes_is_refused_and_not_given_as_numbers(infer, tiny):
    request = infer(tiny.images(1))
    output = request.outputs.add(name="probabilities")
    output.parameters["classification"].int64_param = 3

    with pytest.raises(InvalidRequestError, match="asks for classification, which this server"):
        tensors.requested(request, OUTPUTS)
