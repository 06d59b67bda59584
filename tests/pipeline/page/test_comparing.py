from dataclasses import replace

import pytest

from pipeline import page
from pipeline.page import comparing, words
from pipeline.page.evidence import Evidence


def compare(first, second):
    return comparing.compare([first.manifest, second.manifest], [first.found, second.found])


@pytest.fixture
def pair(make_classifier):
    return make_classifier(), make_classifier(seed=5, version=4)


def test_rows_are_paired_where_both_answered_the_same_ones(pair):
    first, second = (one.found.predicted == one.found.targets for one in pair)

    paired = compare(*pair).paired

    assert paired.only_first == (first & ~second).sum()
    assert paired.only_second == (second & ~first).sum()
    assert paired.rows == len(first)
    assert 0 < paired.p <= 1


@pytest.mark.parametrize("change", ["data", "labels", "evidence", "rows"])
def test_rows_are_not_paired_otherwise(pair, change):
    first, second = pair
    if change == "data":
        second.manifest.dataset.sha256 = "00"
    elif change == "labels":
        second.manifest.labels[0] = "another"
    elif change == "evidence":
        second = replace(second, found=Evidence.empty())
    else:
        second.found.targets[0] = 3

    assert compare(first, second).paired is None


def test_a_difference_that_chance_would_make_is_called_none(pair):
    found = compare(*pair)

    assert found.paired.p > 0.05
    assert found.verdict.startswith("No difference beyond chance")


def test_the_same_answers_are_said_to_be_the_same(pair):
    first = pair[0]

    assert compare(first, first).verdict == "Both are right on the same rows"
    unknown = replace(first, found=Evidence.empty())
    assert compare(unknown, unknown).verdict == "Both are right equally often"


def test_the_more_accurate_one_is_named(pair):
    first, second = pair
    second.found.predicted[:] = second.found.targets
    second.manifest.evaluation.accuracy.value = 1.0

    assert compare(first, second).verdict.startswith("B is ")
    assert compare(second, first).verdict.startswith("A is ")


def test_models_of_other_data_are_not_compared(pair):
    pair[1].manifest.dataset.sha256 = "00"

    assert "not to be compared" in compare(*pair).verdict


def test_models_that_do_not_classify_are_compared_by_their_error(line):
    found = compare(line, line)

    assert found.accuracies is None
    assert found.verdict == "Both have the same mean squared error"


@pytest.mark.parametrize("same_data", [True, False])
def test_a_classifier_is_not_held_against_a_model_of_numbers(pair, line, models, same_data):
    if same_data:
        line.manifest.dataset.sha256 = pair[0].manifest.dataset.sha256

    text, found = page.of_two(pair[0].write(models), line.write(models))

    assert not found.comparable
    assert "not to be compared" in found.verdict
    assert '<p class="verdict neither">' in text
    losses = [f"{one.manifest.evaluation.loss:.4g}" for one in (pair[0], line)]
    assert f'<th scope="row">loss</th><td>{losses[0]}</td><td>{words.NONE}</td>' in text
    assert (
        f'<th scope="row">mean squared error</th><td>{words.NONE}</td><td>{losses[1]}</td>' in text
    )
    assert "Validation loss" not in text


def test_the_page_says_what_a_p_value_is_of(pair, models):
    text, found = page.of_two(*(one.write(models) for one in pair))

    assert found.comparable
    assert "<small>how often chance alone gives such a difference</small>" in text


def test_only_settings_that_differ_are_listed(pair):
    assert compare(*pair).settings == (("training.seed", "42", "47"),)


def test_the_page_names_both_and_their_figures(pair, models):
    paths = [one.write(models) for one in pair]

    text, found = page.of_two(*paths)

    for there in ("garments 3", "garments 4", found.verdict, "training.seed", "tflite-int16x8"):
        assert there in text


def test_a_variant_without_a_file_has_no_size(pair, models):
    text, _ = page.of_two(*(one.write(models) for one in pair))

    assert "0\u00a0KiB</td>" not in text.replace("800\u00a0KiB", "")


def test_a_variant_that_only_one_has_is_not_made_by_the_other(pair, models):
    del pair[1].manifest.parity[0]

    text, _ = page.of_two(*(one.write(models) for one in pair))

    assert "not made" in text
