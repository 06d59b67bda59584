import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import bundle_pb2, inference_pb2
from service import tensors
from service.errors import InvalidRequestError, UnimplementedError
from service.tensors import Output

SPEC = bundle_pb2.TensorSpec(name="image", datatype="UINT8", shape=[-1, 2, 2, 1])
OUTPUTS = [
    bundle_pb2.TensorSpec(name=name, datatype="FP32", shape=[-1, 3])
    for name in ("probabilities", "logits")
]
LABELS = ("dark", "light", "striped")
WIRE = {  # what the protocol calls them, and how numpy holds them
    "BOOL": "?",
    "UINT8": "u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
    "INT8": "i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
TYPED = {  # the field of `contents`, and the smallest and largest value that it may have
    "BOOL": ("bool_contents", False, True),
    "UINT8": ("uint_contents", 0, 2**8 - 1),
    "UINT16": ("uint_contents", 0, 2**16 - 1),
    "UINT32": ("uint_contents", 0, 2**32 - 1),
    "UINT64": ("uint64_contents", 0, 2**64 - 1),
    "INT8": ("int_contents", -(2**7), 2**7 - 1),
    "INT16": ("int_contents", -(2**15), 2**15 - 1),
    "INT32": ("int_contents", -(2**31), 2**31 - 1),
    "INT64": ("int64_contents", -(2**63), 2**63 - 1),
    "FP32": ("fp32_contents", -3.5, float("inf")),
    "FP64": ("fp64_contents", -1e300, float("inf")),
}


def changed(infer, tiny, rows=2, **fields):
    """A good request for `rows` images, its input's fields replaced by `fields`."""
    request = infer(tiny.images(rows))
    shape = fields.pop("shape", None)
    if shape is not None:
        request.inputs[0].shape[:] = shape
    for name, value in fields.items():
        setattr(request.inputs[0], name, value)
    return request


def spec(datatype, *shape):
    return bundle_pb2.TensorSpec(name="x", datatype=datatype, shape=shape)


def raw(datatype, shape, *contents):
    request = inference_pb2.ModelInferRequest(model_name="m", raw_input_contents=contents)
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    return request


def typed(datatype, shape, **contents):
    request = inference_pb2.ModelInferRequest(model_name="m")
    request.inputs.add(
        name="x",
        datatype=datatype,
        shape=shape,
        contents=inference_pb2.InferTensorContents(**contents),
    )
    return request


def refusal(request, spec=SPEC, max_rows=8, error=InvalidRequestError):
    with pytest.raises(error) as caught:
        tensors.decode(request, spec, max_rows)
    return str(caught.value)


def written(array, output=None, labels=LABELS):
    """Return the one output of a response, and its raw contents."""
    response = inference_pb2.ModelInferResponse()
    tensors.append_output(response, output or Output("y"), array, labels)
    (described,), (content,) = response.outputs, response.raw_output_contents
    return described, content


def test_rows_arrive_as_they_were_sent_and_cannot_be_written(infer, tiny):
    images = tiny.images(3)

    decoded = tensors.decode(infer(images), SPEC, 8)

    np.testing.assert_array_equal(decoded, images)
    assert decoded.dtype == np.uint8
    assert not decoded.flags.writeable


def test_every_datatype_of_the_protocol_that_is_a_number_is_known():
    assert {name: np.dtype(text) for name, text in WIRE.items()} == tensors.DTYPE
    assert {**tensors.CONTENTS, "FP16": ""}.keys() == {*WIRE, "BYTES"}


@pytest.mark.parametrize("datatype", sorted(WIRE))
def test_raw_contents_are_row_major_and_little_endian_both_ways(datatype):
    array = np.array([[0, 1], [1, 0]] if datatype == "BOOL" else [[1, 2], [3, 100]], WIRE[datatype])

    decoded = tensors.decode(raw(datatype, [2, 2], array.tobytes()), spec(datatype, -1, 2), 2)
    described, content = written(decoded)

    assert decoded.dtype == np.dtype(WIRE[datatype])
    np.testing.assert_array_equal(decoded, array)
    assert described == inference_pb2.ModelInferResponse.InferOutputTensor(
        name="y", datatype=datatype, shape=[2, 2]
    )
    assert content == array.tobytes()


@pytest.mark.parametrize("datatype", sorted(TYPED))
def test_typed_contents_hold_the_smallest_and_the_largest_value(datatype):
    field, smallest, largest = TYPED[datatype]

    decoded = tensors.decode(
        typed(datatype, [2, 1], **{field: [smallest, largest]}), spec(datatype, -1, 1), 2
    )

    assert decoded.dtype == np.dtype(WIRE[datatype])
    assert decoded.tolist() == [[smallest], [largest]]


@pytest.mark.parametrize("datatype", ["UINT8", "UINT16", "INT8", "INT16"])
def test_value_that_a_narrow_datatype_cannot_hold_is_refused_and_not_cut(datatype):
    field, smallest, largest = TYPED[datatype]
    beyond = [largest + 1] if datatype.startswith("U") else [smallest - 1, largest + 1]

    for value in beyond:
        said = refusal(typed(datatype, [2, 1], **{field: [1, value]}), spec(datatype, -1, 1))
        low, high = sorted((1, value))
        assert said == (
            f"input 'x' has values from {low} to {high} in {field}, which {datatype} cannot hold"
        )


@pytest.mark.parametrize("datatype", sorted(TYPED))
def test_typed_contents_of_another_datatype_are_refused(datatype):
    field, one, _ = TYPED[datatype]
    others = {other for other, _, _ in TYPED.values()} - {field}

    for other in sorted(others):
        for contents in ({other: [1]}, {other: [1], field: [one]}):
            said = refusal(typed(datatype, [1, 1], **contents), spec(datatype, -1, 1))
            assert said.startswith(f"input 'x' is {datatype} and has ")
            assert said.endswith(f"expected {field} alone")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_typed_contents_of_another_count_are_refused(count):
    request = typed("INT32", [2, 1], int_contents=[7] * count)

    assert refusal(request, spec("INT32", -1, 1)) == (
        f"input 'x' has {count} elements in int_contents, expected 2"
    )


def test_half_floats_exist_raw_only():
    assert refusal(typed("FP16", [1, 1], fp32_contents=[1]), spec("FP16", -1, 1)) == (
        "input 'x' is FP16, which has no contents field; send it in raw_input_contents"
    )


def test_brain_floats_are_no_datatype_of_any_model_here():
    assert "data-type is 'BF16'" in refusal(raw("BF16", [1, 1], bytes(2)), spec("FP16", -1, 1))


@pytest.mark.parametrize("datatype", [*sorted(TYPED), "FP16"])
def test_contents_beside_raw_contents_are_refused(datatype):
    field = TYPED.get(datatype, ("fp32_contents",))[0]
    for contents in ({field: [1]}, {}):
        request = typed(datatype, [1, 1], **contents)
        request.raw_input_contents.append(bytes(np.dtype(WIRE[datatype]).itemsize))
        assert refusal(request, spec(datatype, -1, 1)) == (
            "contents field must not be specified when using raw_input_contents for 'x' "
            "for model 'm'"
        )


@pytest.mark.parametrize("value", [2, 0x7F, 0xFF])
def test_bool_is_a_byte_of_zero_or_one(value):
    decoded = tensors.decode(raw("BOOL", [2, 1], b"\x00\x01"), spec("BOOL", -1, 1), 2)
    assert decoded.tolist() == [[False], [True]]

    said = refusal(raw("BOOL", [2, 1], bytes([1, value])), spec("BOOL", -1, 1))
    assert said == "input 'x' is BOOL and has bytes beside 0 and 1"


def test_output_that_is_a_view_is_sent_row_major():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)

    described, content = written(array.T)

    assert described.shape == [3, 2]
    assert content == array.T.tobytes()


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
        [2**62, 4, 1, 1],
        [-(2**63), 2, 2, 1],
    ],
)
def test_wrong_wildcard_and_empty_shapes_are_refused(infer, tiny, shape):
    listed = ",".join(map(str, shape))

    assert refusal(changed(infer, tiny, shape=shape)) == (
        f"unexpected shape for input 'image' for model 'tiny'. Expected [-1,2,2,1], got [{listed}]"
    )


@pytest.mark.parametrize("shape", [[-1, -1], [1, -1], [-1, 1], [0, 1], [1, 0]])
def test_only_the_model_has_wildcards(shape):
    sizes = spec("FP32", -1, -1)

    assert tensors.decode(raw("FP32", [1, 1], bytes(4)), sizes, 8).shape == (1, 1)
    assert "unexpected shape" in refusal(raw("FP32", shape, bytes(4)), sizes)
    assert "unexpected shape" in refusal(raw("FP32", shape, b""), sizes)
    assert "unexpected shape" in refusal(typed("FP32", shape, fp32_contents=[1]), sizes)


def test_batch_at_the_limit_is_taken_and_one_row_more_is_refused(infer, tiny):
    assert len(tensors.decode(infer(tiny.images(8)), SPEC, 8)) == 8
    assert refusal(infer(tiny.images(9))) == (
        "inference request batch-size must be <= 8 for 'tiny', got 9; "
        "split it into smaller requests"
    )


def test_shape_whose_product_would_overflow_is_refused_by_its_batch(infer, tiny):
    assert "batch-size must be <= 8" in refusal(changed(infer, tiny, shape=[2**62, 2, 2, 1]))


@pytest.mark.parametrize("shape", [[1, 2**62, 4], [1, 2**32, 2**32], [8, 2**63 - 1, 2**63 - 1]])
def test_shape_whose_size_overflows_64_bits_does_not_fit_no_bytes(shape):
    elements = shape[0] * shape[1] * shape[2]  # a multiple of 2**64, or nearly
    sizes = spec("FP32", -1, -1, -1)

    assert refusal(raw("FP32", shape, b""), sizes) == (
        f"input byte size mismatch for input 'x' for model 'm'. Expected {elements * 4}, got 0"
    )
    assert refusal(typed("FP32", shape, fp32_contents=[]), sizes) == (
        f"input 'x' has 0 elements in fp32_contents, expected {elements}"
    )


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
        f"raw_input_contents has {count} entries for model 'tiny', expected 1 for input 'image'"
    )


def test_input_in_shared_memory_is_said_to_be_a_thing_that_is_not_done(infer, tiny):
    request = infer(tiny.images(1))
    request.inputs[0].parameters["shared_memory_region"].string_param = "region"

    assert refusal(request, error=UnimplementedError) == (
        "'image' is said to be in shared memory, which this server does not do; "
        "send it in raw contents"
    )


def framed(*strings):
    return b"".join(struct.pack("<I", len(string)) + string for string in strings)


def pictures(shape, *contents, **typed):
    request = inference_pb2.ModelInferRequest(model_name="tiny", raw_input_contents=contents)
    request.inputs.add(name="image", datatype="BYTES", shape=shape)
    if typed:
        request.inputs[0].contents.CopyFrom(inference_pb2.InferTensorContents(**typed))
    return request


@pytest.mark.parametrize("shape", [[3], [3, 1]])
def test_pictures_come_as_bytes_with_their_lengths_before_them_or_in_contents(shape):
    files = [b"one", b"", b"three"]

    assert tensors.decode(pictures(shape, framed(*files)), SPEC, 8) == files
    assert tensors.decode(pictures(shape, bytes_contents=files), SPEC, 8) == files


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        framed(b"a"),
        framed(b"a", b"b", b"c"),
        framed(b"a", b"b")[:-1],
        framed(b"a", b"b") + b"\x00",
        framed(b"a") + struct.pack("<I", 2**32 - 1),
        framed(b"a") + struct.pack("<I", 2**31),
    ],
)
def test_bytes_that_are_not_framed_as_their_shape_says_are_refused(content):
    assert refusal(pictures([2], content)) == (
        f"input 'image' has {len(content)} bytes, which are not 2 elements of datatype BYTES; "
        "expected 4 bytes of length before each"
    )


def test_pictures_in_contents_are_as_many_as_the_shape_says_and_alone():
    assert refusal(pictures([2], bytes_contents=[b"a"])) == (
        "input 'image' has 1 elements in bytes_contents, expected 2"
    )
    assert refusal(pictures([1], framed(b"a"), bytes_contents=[b"a"])).startswith(
        "contents field must not be specified when using raw_input_contents"
    )


@pytest.mark.parametrize("of", ["tensor", "pictures"])
def test_shape_of_millions_of_dimensions_is_not_read(of):
    millions = [1] * (1 << 22)
    request = pictures(millions, b"")
    if of == "tensor":
        request.inputs[0].datatype = "UINT8"
    del millions

    tracemalloc.start()
    said = refusal(request)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert said.endswith(f"it has {1 << 22} dimensions, expected at most 32")
    assert peak_bytes < 1 << 20


@pytest.mark.parametrize("shape", [[], [0], [-1], [1, 2], [1, 1, 1], [2, 2, 2, 1]])
def test_shape_of_pictures_is_their_number(shape):
    listed = ",".join(map(str, shape))

    assert refusal(pictures(shape, framed(b"a"))) == (
        f"unexpected shape for input 'image' for model 'tiny'. Expected [-1] pictures, "
        f"got [{listed}]"
    )


@pytest.mark.parametrize("rows", [9, 2**62])
def test_pictures_over_the_limit_of_rows_are_refused_before_they_are_looked_at(rows):
    assert len(tensors.decode(pictures([8], framed(*[b"a"] * 8)), SPEC, 8)) == 8
    assert refusal(pictures([rows], b"")) == (
        f"inference request batch-size must be <= 8 for 'tiny', got {rows}; "
        "split it into smaller requests"
    )


@pytest.mark.parametrize(
    ("datatype", "shape", "takes"),
    [
        ("UINT8", (-1, 28, 28, 1), True),
        ("UINT8", (-1, 32, 32, 3), True),
        ("UINT8", (-1, 32, 32, 2), False),
        ("UINT8", (-1, 32, 32), False),
        ("UINT8", (-1, -1, -1, 3), False),
        ("FP32", (-1, 28, 28, 1), False),
    ],
)
def test_pictures_are_for_models_of_images_of_one_size(datatype, shape, takes):
    wanted = bundle_pb2.TensorSpec(name="image", datatype=datatype, shape=shape)

    assert tensors.takes_pictures(wanted) is takes
    if not takes:
        assert "data-type is 'BYTES'" in refusal(pictures([1], framed(b"a")), wanted)


def asked(*outputs):
    """Ask for outputs by name, or by name and number of classes."""
    request = inference_pb2.ModelInferRequest(model_name="tiny")
    for output in outputs:
        name, *classes = (output,) if isinstance(output, str) else output
        added = request.outputs.add(name=name)
        for count in classes:
            added.parameters["classification"].int64_param = count
    return tensors.requested(request, OUTPUTS)


def test_no_requested_output_means_all_and_others_keep_the_asked_order():
    assert asked() == [Output("probabilities"), Output("logits")]
    assert asked("logits", "probabilities") == [Output("logits"), Output("probabilities")]
    assert asked("logits") == [Output("logits")]
    assert asked(("logits", 2), "probabilities") == [Output("logits", 2), Output("probabilities")]


def test_unknown_output_is_refused():
    with pytest.raises(InvalidRequestError) as caught:
        asked("logits", "boxes")

    assert str(caught.value) == (
        "unexpected inference output 'boxes' for model 'tiny'; it has probabilities, logits"
    )


def test_output_that_is_asked_for_twice_is_refused():
    with pytest.raises(InvalidRequestError) as caught:
        asked("logits", "probabilities", "logits")

    assert str(caught.value) == "inference output 'logits' is requested twice for model 'tiny'"


def test_output_in_shared_memory_is_said_to_be_a_thing_that_is_not_done():
    request = inference_pb2.ModelInferRequest(model_name="tiny")
    request.outputs.add(name="logits").parameters["shared_memory_region"].string_param = "region"

    with pytest.raises(UnimplementedError, match="'logits' is said to be in shared memory"):
        tensors.requested(request, OUTPUTS)


@pytest.mark.parametrize(
    "parameter",
    [{"int64_param": 0}, {"int64_param": -1}, {"uint64_param": 1}, {"string_param": "1"}, {}],
)
def test_number_of_classes_is_a_positive_whole_number(parameter):
    request = inference_pb2.ModelInferRequest(model_name="tiny")
    added = request.outputs.add(name="logits").parameters["classification"]
    added.CopyFrom(inference_pb2.InferParameter(**parameter))

    with pytest.raises(InvalidRequestError) as caught:
        tensors.requested(request, OUTPUTS)

    assert str(caught.value) == (
        "the parameter 'classification' of output 'logits' must be a positive int64_param: "
        "how many classes to return"
    )


def classes(array, count, labels=LABELS):
    described, content = written(np.array(array), Output("y", count), labels)
    assert (described.name, described.datatype) == ("y", "BYTES")
    rows, columns = described.shape
    strings, start = [], 0
    while start < len(content):
        (size,) = struct.unpack_from("<I", content, start)
        strings.append(content[start + 4 : start + 4 + size].decode())
        start += 4 + size
    assert len(strings) == rows * columns
    return [strings[row * columns : (row + 1) * columns] for row in range(rows)]


def test_classes_are_value_index_and_label_as_triton_writes_them():
    array = np.array([[0.25, -1.5, 100], [1e-7, 2 / 3, 0]], np.float32)

    assert classes(array, 2) == [
        ["100.000000:2:striped", "0.250000:0:dark"],
        ["0.666667:1:light", "0.000000:0:dark"],
    ]
    assert classes(array, 1) == [["100.000000:2:striped"], ["0.666667:1:light"]]


@pytest.mark.parametrize("count", [3, 4, 2**63 - 1])
def test_more_classes_than_there_are_are_all_of_them(count):
    assert len(classes(np.zeros((1, 3), np.float32), count)[0]) == 3


def test_equal_values_keep_the_order_of_their_classes_and_nan_comes_last():
    array = np.array([[1, np.nan, 2, 1, -np.inf, 2]], np.float32)

    order = [text.split(":")[1] for text in classes(array, 6, ())[0]]

    assert order == ["2", "5", "0", "3", "4", "1"]


@pytest.mark.parametrize("dtype", ["f4", "u1"])
def test_thousands_of_equal_values_keep_the_order_of_their_classes(dtype):
    values = np.arange(4000) % 3

    order = [int(text.split(":")[1]) for text in classes(values[None].astype(dtype), 4000, ())[0]]

    assert order == sorted(range(4000), key=lambda index: (-values[index], index))


def test_class_without_a_label_has_none():
    assert classes(np.array([[1, 3, 2]], np.float32), 3, ("a", "b")) == [
        ["3.000000:1:b", "2.000000:2", "1.000000:0:a"]
    ]


@pytest.mark.parametrize(
    ("dtype", "values", "texts"),
    [
        ("u1", [0, 255, 7], ["255:1", "7:2", "0:0"]),
        ("i1", [-128, 127, 0], ["127:1", "0:2", "-128:0"]),
        ("i8", [2**53, 2**53 + 1, -(2**63)], [f"{2**53 + 1}:1", f"{2**53}:0", f"{-(2**63)}:2"]),
        ("u8", [0, 2**64 - 1, 2**64 - 2], [f"{2**64 - 1}:1", f"{2**64 - 2}:2", "0:0"]),
        ("?", [False, True, True], ["1:1", "1:2", "0:0"]),
        ("f8", [1e300, 0.5, -1], [f"{1e300:f}:0", "0.500000:1", "-1.000000:2"]),
        ("f2", [1, 0.5, 2], ["2.000000:2", "1.000000:0", "0.500000:1"]),
    ],
)
def test_classes_of_every_kind_of_number_are_in_order_and_whole_ones_have_no_point(
    dtype, values, texts
):
    assert classes(np.array([values], dtype), 3, ()) == [texts]


def test_classes_of_a_row_of_several_dimensions_are_counted_through():
    array = np.arange(8, dtype=np.float32).reshape(2, 2, 2)

    assert classes(array, 1, ()) == [["3.000000:3"], ["7.000000:3"]]


def test_label_of_any_script_is_sent_as_utf8():
    assert classes(np.array([[1]], np.float32), 1, ("Größe:大",)) == [["1.000000:0:Größe:大"]]


SIZES = st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 4)
TENSORS = st.builds(
    inference_pb2.ModelInferRequest.InferInputTensor,
    name=st.just("image") | st.text(max_size=5),
    datatype=st.just("UINT8") | st.sampled_from([*sorted(WIRE), "BYTES"]) | st.text(max_size=5),
    shape=st.builds(lambda rows: [rows, 2, 2, 1], SIZES) | st.lists(SIZES, max_size=5),
    contents=st.none()
    | st.builds(
        inference_pb2.InferTensorContents,
        uint_contents=st.lists(st.integers(0, 300), max_size=8),
        bytes_contents=st.lists(st.binary(max_size=3), max_size=3),
    ),
)
REQUESTS = st.builds(
    inference_pb2.ModelInferRequest,
    model_name=st.text(max_size=5),
    inputs=st.lists(TENSORS, min_size=1, max_size=1) | st.lists(TENSORS, max_size=3),
    raw_input_contents=st.lists(
        st.sampled_from([4, 8, 16]).flatmap(lambda size: st.binary(min_size=size, max_size=size))
        | st.lists(st.binary(max_size=3), max_size=4).map(lambda strings: framed(*strings))
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

    assert 1 <= len(decoded) <= 4
    contents = request.inputs[0].contents
    if isinstance(decoded, list):
        sent = list(request.raw_input_contents)
        assert sent == [framed(*decoded)] or list(contents.bytes_contents) == decoded
        return
    assert decoded.shape == tuple(request.inputs[0].shape)
    sent = [*request.raw_input_contents, bytes(contents.uint_contents)]
    assert decoded.tobytes() == sent[0]


@given(
    st.sampled_from(sorted(WIRE)),
    st.lists(st.integers(-2, 4) | SIZES, min_size=2, max_size=3),
    st.integers(0, 16),
)
def test_any_shape_for_a_model_of_any_shape_is_decoded_or_refused(datatype, shape, elements):
    content = bytes(elements * np.dtype(WIRE[datatype]).itemsize)

    try:
        decoded = tensors.decode(raw(datatype, shape, content), spec(datatype, -1, -1), 4)
    except InvalidRequestError:
        return

    assert decoded.shape == tuple(shape)
    assert decoded.size == elements


@given(st.sampled_from(sorted(WIRE)), st.integers(1, 6), st.integers(1, 3), st.data())
def test_raw_numbers_come_back_as_they_went(datatype, rows, columns, data):
    size = rows * columns * np.dtype(WIRE[datatype]).itemsize
    element = st.sampled_from([0, 1]) if datatype == "BOOL" else st.integers(0, 255)
    content = bytes(data.draw(st.lists(element, min_size=size, max_size=size)))

    decoded = tensors.decode(raw(datatype, [rows, columns], content), spec(datatype, -1, -1), 6)
    described, answer = written(decoded)

    assert answer == content
    assert (described.datatype, described.shape) == (datatype, [rows, columns])


@given(st.sampled_from(sorted(TYPED)), st.integers(1, 6), st.data())
def test_typed_numbers_are_the_same_as_raw_ones(datatype, rows, data):
    field, smallest, largest = TYPED[datatype]
    element = {
        "B": st.booleans(),
        "F": st.floats(width=32 if datatype == "FP32" else 64, allow_nan=False),
    }.get(datatype[0], st.integers(int(smallest), 0 if largest == float("inf") else int(largest)))
    values = data.draw(st.lists(element, min_size=rows, max_size=rows))
    array = np.array(values, WIRE[datatype])

    one = tensors.decode(typed(datatype, [rows], **{field: values}), spec(datatype, -1), 6)
    other = tensors.decode(raw(datatype, [rows], array.tobytes()), spec(datatype, -1), 6)

    assert one.dtype == other.dtype
    assert one.tobytes() == other.tobytes()
