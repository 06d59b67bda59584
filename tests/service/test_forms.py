import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2
from service import forms, tensors
from service.batcher import Batch
from service.forms import MAX_ALIKE, MAX_HEAD_BYTES, MAX_LENGTHS, Form, Forms, varint
from service.parameters import Parameters

PLAIN = Parameters(level=1, wait_s=float("inf"))


@pytest.fixture
def form(repository):
    """Return a function that makes a form of requests to the tiny model."""

    def form(request=None):
        served = repository.get("tiny", "")
        request = inference_pb2.ModelInferRequest() if request is None else request
        outputs = tensors.requested(request, served.manifest.outputs)
        return Form(request.id, served, PLAIN, outputs)

    return form


def kept(known, request, form, images, changes=0):
    """Keep the form of a request; return its content."""
    content = request.SerializeToString()
    parsed = inference_pb2.ModelInferRequest.FromString(content)
    known.keep(content, parsed, form, images, changes)
    return content


def batch_of(tiny, images):
    logits = tiny.logits(images)
    return Batch(
        {"probabilities": logits / 2, "logits": logits}, rows=len(images), started_s=0, infer_s=0
    )


# What is found again


def test_request_like_one_before_is_known_with_its_own_rows(form, infer, tiny):
    known, one = Forms(), form()
    kept(known, infer(tiny.images(3)), one, tiny.images(3))

    found = known.find(infer(tiny.images(3, seed=9)).SerializeToString(), 0)

    assert found is not None
    assert found[0] is one
    np.testing.assert_array_equal(found[1], tiny.images(3, seed=9))
    assert not found[1].flags.writeable  # it shares the request's memory


def test_request_is_not_known_before_one_like_it_was_kept(infer, tiny):
    assert Forms().find(infer(tiny.images(1)).SerializeToString(), 0) is None


@pytest.mark.parametrize(
    "other",
    [
        {"model_name": "tinx"},  # as long
        {"model_name": "tiny", "model_version": "1"},
        {"model_name": "tiny", "id": "1"},
    ],
)
def test_request_that_differs_before_its_tensor_is_not_known(form, infer, tiny, other):
    known = Forms()
    kept(known, infer(tiny.images(2)), form(), tiny.images(2))

    assert known.find(infer(tiny.images(2), **other).SerializeToString(), 0) is None


def test_request_of_another_shape_of_the_same_length_is_not_known(form, infer, tiny):
    known = Forms()
    content = kept(known, infer(tiny.images(2)), form(), tiny.images(2))
    other = infer(tiny.images(2))
    other.inputs[0].shape[1:3] = [4, 1]
    other = other.SerializeToString()
    assert len(other) == len(content)

    assert known.find(other, 0) is None


def test_form_is_not_known_any_more_once_the_repository_has_changed(form, infer, tiny):
    known = Forms()
    content = kept(known, infer(tiny.images(1)), form(), tiny.images(1), changes=3)

    assert known.find(content, 3) is not None
    assert known.find(content, 4) is None


@pytest.mark.parametrize("cut", [1, 5])
def test_request_whose_tensor_ends_too_soon_or_goes_on_is_not_known(form, infer, tiny, cut):
    known = Forms()
    content = kept(known, infer(tiny.images(2)), form(), tiny.images(2))

    assert known.find(content[:-cut], 0) is None
    assert known.find(content + bytes(cut), 0) is None


# What is kept


def test_request_with_an_id_is_not_kept(form, infer, tiny):
    known = Forms()
    content = kept(known, infer(tiny.images(1), id="7"), form(), tiny.images(1))

    assert known.find(content, 0) is None


def test_request_with_two_tensors_is_not_kept(form, infer, tiny):
    known, request = Forms(), infer(tiny.images(1))
    request.raw_input_contents.append(b"more")
    content = kept(known, request, form(), tiny.images(1))

    assert known.find(content, 0) is None


def test_request_whose_tensor_is_not_last_is_not_kept(form, infer, tiny):
    known, images = Forms(), tiny.images(1)
    tail = inference_pb2.ModelInferRequest(model_version="1").SerializeToString()
    content = infer(images).SerializeToString() + tail
    known.keep(content, inference_pb2.ModelInferRequest.FromString(content), form(), images, 0)

    assert known.find(content, 0) is None


def test_request_whose_last_field_only_looks_like_its_tensor_is_not_kept(form, infer, tiny):
    """An unknown field that ends with the very bytes of raw contents is no raw contents."""
    known, images = Forms(), tiny.images(1)
    raw = images.tobytes()
    imitation = forms.RAW_INPUT_TAG + varint(len(raw)) + raw
    unknown = b"\xfa\x3f" + varint(len(imitation)) + imitation  # field 1023
    content = infer(images).SerializeToString() + unknown
    known.keep(content, inference_pb2.ModelInferRequest.FromString(content), form(), images, 0)

    assert known.find(content, 0) is None


def test_request_with_booleans_is_not_kept(form, infer, tiny):
    known = Forms()
    content = kept(known, infer(tiny.images(1)), form(), np.zeros((1, 4), bool))

    assert known.find(content, 0) is None


def test_request_with_a_long_head_is_not_kept(form, infer, tiny):
    known, images = Forms(), tiny.images(1)
    for length, is_kept in ((MAX_HEAD_BYTES // 2, True), (MAX_HEAD_BYTES, False)):
        content = kept(known, infer(images, model_version="1" * length), form(), images)
        assert (known.find(content, 0) is not None) is is_kept


def test_forms_of_one_length_and_of_all_lengths_are_bounded(form, infer, tiny):
    known, images = Forms(), tiny.images(1)
    names = [f"name-{number}" for number in range(MAX_ALIKE + 1)]
    contents = [kept(known, infer(images, model_name=name), form(), images) for name in names]
    assert [known.find(content, 0) is not None for content in contents] == [False, *[True] * 4]

    last = b""
    for rows in range(1, MAX_LENGTHS + 20):
        last = kept(known, infer(tiny.images(rows)), form(), tiny.images(rows))
    assert len(known._kept) <= MAX_LENGTHS
    assert known.find(last, 0) is not None


@given(
    name=st.text(max_size=9),
    version=st.text(max_size=3),
    rows=st.integers(1, 5),
    priority=st.none() | st.integers(0, 9),
    data=st.data(),
)
def test_what_is_known_reads_as_the_parser_reads_it(
    form, infer, tiny, name, version, rows, priority, data
):
    known = Forms()
    request = infer(tiny.images(rows), model_name=name, model_version=version)
    if priority is not None:
        request.parameters["priority"].int64_param = priority
    content = kept(known, request, form(), tiny.images(rows))
    place = data.draw(st.integers(0, len(content) - 1))
    broken = content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :]

    found = known.find(broken, 0)

    if found is not None:
        parsed = inference_pb2.ModelInferRequest.FromString(broken)
        assert parsed.raw_input_contents[0] == found[1].tobytes()
        del parsed.raw_input_contents[:], request.raw_input_contents[:]
        assert parsed == request


# How answers are written


@pytest.mark.parametrize("start", [0, 2, 5])
@pytest.mark.parametrize("rows", [1, 3])
def test_answer_written_in_parts_is_the_message_that_would_be_serialised(form, tiny, start, rows):
    batch = batch_of(tiny, tiny.images(8))
    one = form()
    one.written(batch, 0, rows)

    found = inference_pb2.ModelInferResponse.FromString(one.written(batch, start, rows))

    expected = inference_pb2.ModelInferResponse(model_name="tiny", model_version="1")
    for name in ("probabilities", "logits"):
        array = batch.answers[name][start : start + rows]
        expected.outputs.add(name=name, datatype="FP32", shape=array.shape)
        expected.raw_output_contents.append(array.tobytes())
    assert found == expected


def test_answer_has_the_outputs_that_were_asked_for_and_the_id(form, tiny):
    request = inference_pb2.ModelInferRequest(id="seven")
    request.outputs.add(name="logits")
    batch = batch_of(tiny, tiny.images(2))

    found = inference_pb2.ModelInferResponse.FromString(form(request).written(batch, 1, 1))

    assert found.id == "seven"
    assert [output.name for output in found.outputs] == ["logits"]
    assert found.raw_output_contents == [batch.answers["logits"][1:].tobytes()]


def test_answer_of_another_layout_is_not_written_like_the_last(form, tiny):
    one, logits = form(), tiny.logits(tiny.images(2))
    one.written(batch_of(tiny, tiny.images(2)), 0, 2)
    wide = Batch(
        {"probabilities": logits, "logits": logits.astype(np.float64)},
        rows=2,
        started_s=0,
        infer_s=0,
    )

    found = inference_pb2.ModelInferResponse.FromString(one.written(wide, 0, 2))

    assert [output.datatype for output in found.outputs] == ["FP32", "FP64"]
    assert found.raw_output_contents[1] == logits.astype(np.float64).tobytes()


def test_classes_are_written_each_time(form, tiny):
    request = inference_pb2.ModelInferRequest()
    request.outputs.add(name="logits").parameters["classification"].int64_param = 1
    batch = batch_of(tiny, tiny.images(4))

    found = inference_pb2.ModelInferResponse.FromString(form(request).written(batch, 1, 2))

    assert [output.datatype for output in found.outputs] == ["BYTES"]
    assert list(found.outputs[0].shape) == [2, 1]


@given(st.integers(1, (1 << 64) - 1))
def test_number_is_written_as_protobuf_writes_it(value):
    field = inference_pb2.InferParameter(uint64_param=value).SerializeToString()

    assert field[1:] == varint(value)
