import base64
import io

import numpy as np
import pytest
from PIL import Image

from protos import bundle_pb2
from service.errors import PictureError
from service.playground import answers
from service.playground.variants import Said

SHAPE = (4, 4, 1)


def png(pixels, **options):
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG", **options)
    return written.getvalue()


def report(variant, failure="", *, precision="float32", scale=1.0):
    budget = bundle_pb2.Budget(max_logit=0.5, precision=precision, scale=scale)
    return bundle_pb2.ParityReport(
        variant=variant, budget=budget, passed=not failure, failure=failure, size_bytes=9
    )


def test_an_image_is_shown_as_the_model_sees_it():
    for shape in ((3, 5, 1), (3, 5, 3)):
        pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        head, _, content = answers.source(pixels).partition(",")

        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))

        assert head == "data:image/png;base64"
        assert shown.reshape(shape).tolist() == pixels.tolist()


def test_light_and_dark_are_swapped_before_what_is_missing_is_filled_with_black():
    white = png(np.full((2, 4), 255, np.uint8))

    plain, swapped = (answers.decode(white, SHAPE, invert) for invert in (False, True))

    assert plain[..., 0].tolist() == [[0] * 4, [255] * 4, [255] * 4, [0] * 4]
    assert not swapped.any()


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is not a PNG or JPEG picture"),
        (b"hello", "the file is not a PNG or JPEG picture"),
        (png(np.zeros((99, 99), np.uint8))[:60], "the file cannot be read as a picture: it is cut"),
        (png(np.zeros((9000, 9000), np.uint8)), "the picture has over 64,000,000 pixels"),
        (b"GIF89a" + bytes(40), "the file is not a PNG or JPEG picture"),
    ],
)
def test_what_is_no_picture_is_one_sentence(content, said, invert):
    with pytest.raises(PictureError, match=said):
        answers.decode(content, SHAPE, invert)


def test_a_picture_with_more_bytes_than_it_needs_is_refused():
    content = png(np.zeros((2, 2), np.uint8)) + bytes(5 << 20)

    with pytest.raises(PictureError, match=r"the file has .* bytes for 4 pixels"):
        answers.decode(content, SHAPE, invert=False)


def test_classes_take_turns_among_the_test_images():
    classes = np.array([0, 0, 0, 1, 1, 2])

    assert classes[answers.mixed(classes)].tolist() == [0, 1, 2, 0, 1, 0]


def test_everyone_who_answers_has_a_row_and_the_original_comes_first():
    reports = {name: report(name) for name in ("onnx-float32", "saved-model", "onnx-int8")}
    reports["tflite-int8"] = report("tflite-int8", "it was over its budget")
    said = {
        "served": Said("served", (1.0, 0.0)),
        "saved-model": Said("saved-model", (1.0, 0.0), 0.004),
        "onnx-float32": Said("onnx-float32", (1.0, 0.25), 0.001),
        "onnx-int8": Said("onnx-int8", (0.0, 1.0)),
    }

    rows = answers.rows(tuple(said), said, reports, "onnx-float32")

    assert [one["variant"] for one in rows] == [
        "saved-model", "served", "onnx-float32", "onnx-int8", "tflite-int8",
    ]  # fmt: skip
    assert [one.get("apart") for one in rows] == [0, 0, 0.25, 1, None]
    assert [one.get("same") for one in rows] == [True, True, True, False, None]
    assert rows[0]["ms"] == 4
    assert rows[0]["probabilities"] == pytest.approx([0.7310586, 0.2689414])
    assert rows[-1]["refused"] == "it was over its budget"


def held(original, other, *, tested=True, **budget):
    """Return the row of a variant that answers `other` where the original answers `original`."""
    reports = {name: report(name, **budget) for name in ("saved-model", "onnx")}
    said = {"saved-model": Said("saved-model", original), "onnx": Said("onnx", other)}
    return answers.rows(tuple(said), said, reports, "onnx", tested=tested)[-1]


@pytest.mark.parametrize(
    ("precision", "apart", "over"),
    [("float32", 0.5, False), ("float32", 0.75, True), ("float16", 0.75, True), ("int8", 9, False)],
)
def test_only_floats_can_be_over_their_budget_on_one_image(precision, apart, over):
    row = held((20.0, 0.0), (20.0, float(apart)), precision=precision)

    assert (row["apart"], row["allowed"], row["over"]) == (apart, 0.5, over)
    assert row["integers"] == (precision == "int8")


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(
    ("margin", "other", "unexplained"),
    [(1.0, (0.0, 1.0), False), (1.25, (0.0, 1.0), True), (1.25, (2.0, 1.0), False)],
)
def test_a_flip_is_unexplained_where_the_margin_is_over_twice_the_budget(
    precision, margin, other, unexplained
):
    row = held((margin, 0.0), other, precision=precision)

    assert row["unexplained"] == unexplained


def test_of_an_image_that_is_no_test_image_the_budget_grows_with_its_logits():
    original, other = (40.0, 0.0), (41.5, 0.0)

    strange, known, small = (
        held(original, other, tested=False, scale=10.0),
        held(original, other, scale=10.0),
        held((4.0, 0.0), (4.75, 0.0), tested=False, scale=10.0),
    )

    assert (strange["allowed"], strange["over"]) == (2.0, False)
    assert (known["allowed"], known["over"]) == (0.5, True)
    assert (small["allowed"], small["over"]) == (0.5, True)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_said_and_nothing_is_held_against_it(wrong):
    assert held((1.0, 0.0), (wrong, 0.0))["error"] == "a logit is not finite"
    assert "apart" not in held((wrong, 0.0), (1.0, 0.0))


def test_without_a_budget_there_is_no_verdict():
    said = {"saved-model": Said("saved-model", (1.0, 0.0)), "served": Said("served", (0.0, 1.0))}

    row = answers.rows((), said, {"saved-model": report("saved-model")}, "gone")[1]

    assert (row["apart"], row["same"]) == (1.0, False)
    assert not {"allowed", "over", "unexplained"} & set(row)


def test_sizes_are_as_on_a_terminal():
    assert held((1.0, 0.0), (1.0, 0.0))["size"] == "0 KiB"
    one = report("onnx")
    one.size_bytes = 1_700_000
    assert answers.rows((), {}, {"onnx": one}, "onnx")[1]["size"] == "1.6 MiB"


@pytest.mark.parametrize(
    ("borders", "black"),
    [([0] * 10, True), ([0] * 9 + [255], True), ([0] * 8 + [255] * 2, False), ([31] * 10, True),
     ([32] * 10, False)],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_light_on_black_where_nearly_all_borders_are_black(borders, black, channels):
    images = np.zeros((10, 6, 5, channels), np.uint8)
    images[:] = np.array(borders)[:, np.newaxis, np.newaxis, np.newaxis]
    images[:, 2:4, 2:4] = 255

    assert answers.light_on_black(images) == black


def test_nothing_is_held_against_an_original_that_has_not_answered():
    reports = {name: report(name) for name in ("saved-model", "onnx-int8", "gone")}
    said = {"onnx-int8": Said("onnx-int8", (0.0, 1.0)), "saved-model": Said("", error="no memory")}
    names = ("saved-model", "onnx-int8")

    waiting = answers.rows(names, {"onnx-int8": said["onnx-int8"]}, reports, "onnx-int8")
    failed = answers.rows(names, said, reports, "onnx-int8")

    assert "apart" not in waiting[2] and "apart" not in failed[2]
    assert "probabilities" not in waiting[0] and not waiting[0]["refused"]
    assert failed[0]["error"] == "no memory"
    assert failed[3]["refused"] == "it is not in the bundle"


def test_a_bundle_without_an_original_has_no_row_for_it():
    rows = answers.rows((), {}, {"onnx-float32": report("onnx-float32")}, "onnx-float32")

    assert [one["variant"] for one in rows] == ["served", "onnx-float32"]
