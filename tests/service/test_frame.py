import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2
from service import frame
from service.errors import InvalidRequestError

LARGE = 1 << 17


def request(**fields):
    made = inference_pb2.ModelInferRequest(model_name="m", id="7", **fields)
    made.parameters["priority"].uint64_param = 1
    made.outputs.add(name="y").parameters["classification"].int64_param = 3
    made.inputs.add(name="x", datatype="UINT8", shape=[LARGE])
    return made


def refusal(content):
    with pytest.raises(InvalidRequestError) as caught:
        frame.check(content)
    return str(caught.value)


def test_large_tensors_are_let_through_in_either_form():
    frame.check(request(raw_input_contents=[bytes(LARGE)]).SerializeToString())

    typed = request()
    typed.inputs[0].contents.uint_contents.extend([7] * LARGE)
    frame.check(typed.SerializeToString())

    files = request()
    files.inputs[0].contents.bytes_contents.extend([bytes(LARGE), b""])
    frame.check(files.SerializeToString())


def test_what_is_small_is_left_to_the_parser_whatever_it_is():
    frame.check(b"")
    frame.check(b"\xff" * (1 << 16))
    frame.check(b"\x2a\x00" * (1 << 15))


def shape_of_millions():
    made = request(raw_input_contents=[b""])
    made.inputs[0].shape.extend([1] * LARGE)
    return made.SerializeToString()


def thousands_of_parameters():
    made = request()
    for number in range(1 << 13):
        made.parameters[str(number)].bool_param = True
    return made.SerializeToString()


@pytest.mark.parametrize(
    "content",
    [
        shape_of_millions(),
        thousands_of_parameters(),
        b"\x2a\x00" * LARGE,  # inputs of nothing
        b"\x2a" + bytes([0x80, 0x80, 0x08]) + b"\x18\x01" * (LARGE // 2),  # a shape, unpacked
        b"\x3a\x00" * LARGE,  # raw contents of nothing
        b"\x0a" + bytes([0x80, 0x80, 0x08]) + b"m" * LARGE,  # a name
        b"\x78\x01" * LARGE,  # a field that nobody knows
        b"\x7d" + bytes(4) + b"\x79" + bytes(8) + b"\x78\x01" * LARGE,
    ],
)
def test_what_is_large_and_no_tensor_is_refused_unparsed(content):
    assert refusal(content).startswith(f"the request has {len(content)} bytes, and beside its tens")


@pytest.mark.parametrize(
    ("start", "place"),
    [
        (b"\x0b\x0c", 0),  # a group
        (b"\xff" * 11, 0),  # a number without an end
        (b"\x0a\xff\xff\xff\x7f", 0),  # longer than the message
        (b"\x2a\x02\x0a\x05", 2),  # longer than the input it is in
    ],
)
def test_what_is_large_and_no_message_is_refused_by_its_place(start, place):
    said = refusal(start + bytes(LARGE))

    assert said == f"the request is not a ModelInferRequest: at byte {place} there is no field"


def test_message_that_ends_within_a_field_is_refused():
    content = request(raw_input_contents=[bytes(LARGE)]).SerializeToString()

    for cut in (1, LARGE // 2):
        assert "there is no field" in refusal(content[:-cut])
    assert "there is no field" in refusal(content + b"\x3a")


@given(st.lists(st.binary(max_size=12), max_size=6), st.data())
def test_any_bytes_are_let_through_or_refused(pieces, data):
    filler = data.draw(st.sampled_from([bytes(LARGE), b"\x3a\x80\x80\x08" + bytes(LARGE)]))
    place = data.draw(st.integers(0, len(pieces)))

    with contextlib.suppress(InvalidRequestError):
        frame.check(b"".join([*pieces[:place], filler, *pieces[place:]]))


@given(
    st.builds(
        inference_pb2.ModelInferRequest,
        model_name=st.text(max_size=20),
        model_version=st.text(max_size=5),
        id=st.text(max_size=20),
        raw_input_contents=st.lists(st.binary(max_size=20), max_size=3),
    ),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40),
)
def test_what_is_a_small_request_beside_large_contents_is_let_through(made, shape):
    made.inputs.add(name="x", datatype="FP32", shape=shape)
    made.raw_input_contents.append(bytes(LARGE))

    frame.check(made.SerializeToString())
