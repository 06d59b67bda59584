from dataclasses import replace

import numpy as np
import pytest

from pipeline import data_checks
from pipeline.config import DataConfig
from pipeline.errors import DatasetError
from pipeline.splits import Found, Split, split

RANDOM = np.random.default_rng(0)
LABELS = ("cat", "dog")


def images(rows, side=8):
    return RANDOM.integers(0, 256, (rows, side, side, 1), np.uint8)


def found(train=None, test=None, labels=LABELS):
    return Found(
        train or Split(images(12), np.arange(12) % 2),
        test or Split(images(4), np.arange(4) % 2),
        labels,
    )


def refusal(data):
    with pytest.raises(DatasetError) as caught:
        data_checks.refuse(data)
    return str(caught.value)


def findings(data, **settings):
    return data_checks.findings(data, *split(data.train.targets, DataConfig(**settings)))


def test_data_that_are_as_they_should_be_are_neither_refused_nor_remarked_on():
    data_checks.refuse(found())

    assert findings(found()) == []


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (found(test=Split(images(0), np.arange(0))), "there are no test rows"),
        (found(test=Split(images(4, 9), np.arange(4) % 2)),
         "rows of shape [8, 8, 1], those of the test rows are [9, 9, 1]"),
        (found(train=Split(np.ones((4, 8, 8, 1)), np.arange(4) % 2)),
         "all 4 training rows are the same"),
        (found(labels=("cat",)), "a classifier needs two or more"),
        (found(labels=("cat", "cat")), "expected names that all differ"),
        (found(labels=("cat", "")), "expected names that all differ"),
        (found(labels=("cat", "\ud800")), "not UTF-8: \\ud800; give these other names"),
        (found(labels=("cat", "dog", "cow")), "no training row is of class 2 (cow)"),
        (found(train=Split(images(4), np.array([0, 2, 2, 2])), labels=("0", "1")),
         "no training row is of class 1; expected the classes 0 to 1"),
        (found(train=Split(images(4), np.array([0, 1, 2, 2]))), "and a row of class 2"),
        (found(test=Split(images(2), np.array([0, 2]))), "and a row of class 2; expected 0 to 1"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(data, said):
    assert said in refusal(data)


@pytest.mark.parametrize(("dogs", "remarked"), [(4, False), (3, True)])
def test_classes_are_uneven_beyond_three_to_one(dogs, remarked):
    data = found(train=Split(images(12 + dogs), np.repeat([0, 1], [12, dogs])))

    said = "the classes are uneven: 12 training rows of cat, 3 of dog" in findings(data)

    assert said == remarked


@pytest.mark.parametrize(("dogs", "remarked"), [(3, False), (2, True)])
def test_a_class_of_fewer_than_three_rows_is_remarked_on(dogs, remarked):
    data = found(train=Split(images(6 + dogs), np.repeat([0, 1], [6, dogs])))

    assert ("fewer than 3 training rows: dog" in findings(data)) == remarked


def test_classes_that_are_not_tested_or_not_trained_on_are_named():
    data = found(test=Split(images(2), np.array([0, 0])))

    said = findings(data, max_train_rows=1)

    assert "no test row, so that nothing is known of its accuracy: dog" in said
    assert any(one.startswith("no row among those that are trained on: ") for one in said)


@pytest.mark.parametrize(("highest", "said"), [
    (1, ["no training pixel is above 1 of 255; they look scaled already, which the network does "
         "itself"]),
    (127, ["no training pixel is above 127 of 255"]),
    (128, []),
])  # fmt: skip
def test_pixels_that_use_half_of_the_range_or_less_are_remarked_on(highest, said):
    pixels = images(12) % 2 * highest

    assert findings(found(train=Split(pixels, np.arange(12) % 2))) == said


def test_images_of_one_shade_are_counted_and_some_named():
    pixels = images(12)
    pixels[[1, 2, 4, 7]] = 9

    said = findings(found(train=Split(pixels, np.arange(12) % 2)), validation_share=0.0)

    assert said[1] == "4 training images are of one shade: row 1, row 2, row 4 and 1 more"


def test_rows_in_two_parts_are_named_by_their_numbers_in_the_files():
    train = Split(images(12), np.arange(12) % 2)
    copies = train.inputs[[3, 8]].copy()
    near = train.inputs[5:6].copy()
    near[0, 0, 0] ^= 1
    test = Split(np.concatenate([copies, near]), np.array([1, 1, 1]))

    said = findings(found(train=train, test=test), validation_share=0.0)

    assert said[2:] == [
        "2 of 3 test rows are training rows too: test row 0 and training row 3, test row 1 and "
        "training row 8",
        "1 of these have another target there: test row 1 and training row 8",
        "1 of 3 test rows are nearly a training row (their values correlate at 0.995 or more): "
        "test row 2 and training row 5",
    ]


def test_validation_rows_that_are_trained_on_are_named_as_well():
    train = Split(images(12), np.arange(12) % 2)
    _, held = split(train.targets, DataConfig())
    other = next(row for row in range(12) if row not in held)
    train.inputs[held[0]] = train.inputs[other]

    said = findings(found(train=train))

    assert any(
        one.startswith("1 of 2 validation rows are training rows too: ")
        and f"validation row {held[0]} and training row {other}" in one
        for one in said
    )


def test_numbers_to_come_close_to_are_only_compared_exactly():
    rows = np.arange(6, dtype=np.float32)[:, np.newaxis]
    data = Found(Split(rows, rows), Split(rows[:1], rows[:1] + 1), ())
    data_checks.refuse(data)

    assert findings(data, validation_share=0.0)[1:] == [
        "1 of 1 test rows are training rows too: test row 0 and training row 0",
        "1 of these have another target there: test row 0 and training row 0",
    ]


def test_findings_of_the_source_can_be_sent_whatever_files_they_name():
    odd = replace(found(), findings=("left out: q\udcff.txt",))

    assert findings(odd) == ["left out: q\\udcff.txt"]
