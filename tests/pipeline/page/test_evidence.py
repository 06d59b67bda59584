import io

import numpy as np
import pytest

from pipeline import measures
from pipeline.errors import CheckError
from pipeline.page import evidence
from pipeline.page.evidence import DECADES, PER_DECADE, SIDE, Evidence

LOGITS = np.array([[2, 0, 0], [0, 2, 1], [0, 1, 1.5], [5, 0, 0]], np.float32)
TARGETS = np.array([0, 1, 2, 1])


def images(rows=4, side=8, channels=1):
    return np.random.default_rng(0).integers(0, 256, (rows, side, side, channels), np.uint8)


def of(logits=LOGITS, targets=TARGETS, **more):
    return evidence.of_classifier(images(len(targets)), targets, logits, **more)


def test_what_was_packed_is_read_back():
    found = of(candidates={"onnx-int8": (LOGITS + 0.01, 0.5)}, mistakes=[3])

    again = Evidence.parse(found.packed(), "a/1/report.npz")

    for name in Evidence.__slots__:
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))


def test_only_images_that_are_shown_are_kept():
    found = of(mistakes=[3, 1])

    assert found.image_rows.tolist() == [1, 3]
    np.testing.assert_array_equal(found.image(3), images()[3])
    assert found.image(0) is None
    assert found.image(4) is None


def test_inputs_that_are_no_images_are_not_kept():
    rows = np.zeros((4, 3), np.float32)

    assert not len(evidence.of_classifier(rows, TARGETS, LOGITS, mistakes=[3]).image_rows)


def test_the_bins_are_those_of_the_calibration_error():
    random = np.random.default_rng(3)
    logits, targets = random.normal(size=(500, 5)), random.integers(0, 5, 500)

    found = evidence.of_classifier(images(500), targets, logits)

    apart = np.abs(found.bin_right - found.bin_confidence).sum() / found.bin_rows.sum()
    assert apart == pytest.approx(measures.calibration_error(logits, targets))


def test_flips_are_the_rows_whose_class_changed_the_widest_margin_first():
    answers = LOGITS.copy()
    answers[1], answers[2] = (0, 1, 2), (0, 1.5, 1)

    found = of(candidates={"same": (LOGITS, 0.5), "onnx-int8": (answers, 0.5)})

    assert found.flip_variant.tolist() == [1, 1]
    assert found.flip_row.tolist() == [1, 2]
    assert found.flip_to.tolist() == [2, 1]
    assert found.flip_margin.tolist() == [1.0, 0.5]
    assert found.image_rows.tolist() == [1, 2]


def test_no_more_flips_are_kept_than_are_shown():
    logits = np.tile([[1, 0]], (50, 1)).astype(np.float32)

    found = of(logits, np.zeros(50, int), candidates={"bad": (logits[:, ::-1], 0.1)})

    assert len(found.flip_row) == evidence.FLIPS


def test_differences_are_counted_by_their_share_of_what_is_allowed():
    reference = np.zeros((1, 7), np.float32)
    answers = np.array([[0, 1e-9, 0.5, 0.999, 1.001, 1e9, np.nan]])

    counts = evidence.shares(reference, answers, 1.0)

    at_1 = 1 - DECADES[0] * PER_DECADE
    assert counts.sum() == 7
    assert (counts[0], counts[1], counts[-2], counts[-1]) == (1, 1, 1, 1)
    assert (counts[at_1 - 2 : at_1].sum(), counts[at_1]) == (2, 1)


def test_shares_of_many_rows_are_those_of_its_parts():
    reference = np.zeros((evidence.CHUNK_ROWS + 3, 2), np.float32)

    assert evidence.shares(reference, reference + 0.1, 1.0).max() == reference.size


@pytest.mark.parametrize(
    ("shape", "fitted"),
    [
        ((8, 8, 1), (8, 8, 1)),
        ((SIDE, SIDE, 3), (SIDE, SIDE, 3)),
        ((2 * SIDE, SIDE, 3), (SIDE, SIDE // 2, 3)),
        ((1000, 2, 1), (SIDE, 1, 1)),
        ((8, 8, 4), (8, 8, 1)),
        ((SIDE + 1, 8, 2), (SIDE, 8, 1)),
    ],
)
def test_an_image_is_kept_as_gray_or_colour_and_no_larger_than_is_shown(shape, fitted):
    assert evidence.fitted(np.full(shape, 7, np.uint8)).shape == fitted


def test_the_examples_are_the_first_rows_of_the_first_classes():
    assert evidence.example_rows(np.array([5, 2, 2, 0, 5, 9, 7])) == [3, 1, 0, 6]


def test_the_maps_of_an_example_are_scaled_by_the_highest_of_them():
    maps = np.stack([np.full((2, 2, 3), 4.0), np.zeros((2, 2, 3))]).astype(np.float32)
    maps[0, 0, 0, 0] = 0
    first = evidence.FirstLayer("conv", np.ones((3, 3, 1, 3), np.float32), maps)

    found = of(targets=np.array([0, 1, 1, 1]), first=first)

    assert found.map_rows.tolist() == [0, 1]
    assert (found.maps[0].min(), found.maps[0].max(), found.maps[1].max()) == (0, 255, 0)


def test_of_numbers_the_rows_are_kept_that_come_least_close():
    targets = np.arange(40, dtype=np.float32).reshape(20, 2)
    outputs = targets.copy()
    outputs[7] += 3

    found = evidence.of_numbers(targets, outputs, candidates={"onnx": (outputs, 1.0)})

    assert (found.worst_rows[0], found.worst_targets[0].tolist()) == (7, [14, 15])
    assert len(found.point_targets) == 40
    assert not len(found.predicted)


def changed(**arrays):
    content = io.BytesIO()
    found = of(mistakes=[3])
    kept = {name: getattr(found, name) for name in Evidence.__slots__} | arrays
    np.savez(content, **kept)
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"no archive",
        of().packed()[:200],
        changed(images=np.zeros(3)),
        changed(predicted=np.zeros(3)),
        changed(kernels=np.array([{}], object)),
        changed(kernels=np.zeros((3, 3, 0, 100_000_000), np.float32)),
        changed(kernels=np.zeros((1, 1, 1, 2_000_000), np.float32)),
        changed(kernels=np.full((3, 3, 1, 2), np.nan, np.float32)),
        changed(kernels=np.zeros((3, 3, 1, 2), np.complex64)),
        changed(images=np.zeros((1, 8, 8, 1))),
        changed(images=np.zeros((1, 100_000, 8, 1), np.uint8)),
        changed(predicted=np.full(len(TARGETS), -1)),
        changed(targets=np.zeros(len(TARGETS))),
        changed(layer=np.array(["a" * 5000])),
        changed(layer=np.array([7])),
    ],
)
def test_what_is_no_evidence_is_refused_by_name(content):
    with pytest.raises(CheckError, match=r"^a/1/report.npz cannot be read: .*; publish it again$"):
        Evidence.parse(content, "a/1/report.npz")


def test_a_bomb_is_refused_before_it_is_unpacked():
    content = io.BytesIO()
    np.savez_compressed(content, predicted=np.zeros(evidence.MAX_BYTES // 8 + 1))

    with pytest.raises(CheckError, match="bytes unpacked"):
        Evidence.parse(content.getvalue(), "a/1/report.npz")
