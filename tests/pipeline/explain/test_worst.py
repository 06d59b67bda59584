"""Which rows are walked, and what is said of those that were not asked about."""

import pytest

from pipeline.errors import UsageError
from pipeline.explain import worst
from pipeline.explain.divergence import ADDED_UP

FAILURE = "p99.9 |Δlogit| is 3, allowed are 0.3"


@pytest.fixture
def bundled(make_bundle):
    """Return a function that makes a bundle whose original and int8 variant are one ONNX file."""

    def bundled(**of_variant):
        def edit(manifest):
            manifest.parity.add(variant="saved-model", path="model.onnx", passed=True)
            made = manifest.parity.add(variant="onnx-int8", **of_variant)
            made.budget.CopyFrom(manifest.parity[0].budget)
            made.accuracy.rows = 10_000

        return make_bundle(edit=edit)

    return bundled


def test_how_far_it_is_is_told_in_rows_of_both_models(bundled):
    told: list[tuple[int, int]] = []

    worst.of_bundle(bundled(), "onnx-float32", 2, lambda *said: told.append(said))

    assert told == [(0, 34), (17, 34), (34, 34)]  # 12 golden rows and 5 hostile ones


def test_a_variant_that_passed_has_no_failure_to_tell(bundled):
    path = bundled(path="model.onnx", passed=True)

    assert worst.of_bundle(path, "onnx-int8", 2).failure == ""


def test_a_failure_over_all_test_rows_is_told_with_the_command_that_walks_those(bundled):
    path = bundled(path="model.onnx", failure=FAILURE)

    assert worst.of_bundle(path, "onnx-int8", 2).failure == (
        f"over all 10,000 test rows it failed: {FAILURE}; to walk the worst of those: "
        f"train-export explain --reference {path}/model.onnx --candidate {path}/model.onnx "
        "--data ROWS, all test rows in an .npz or a folder"
    )


def test_a_variant_that_was_left_out_is_told_with_its_failure_and_where_its_file_is(bundled):
    with pytest.raises(UsageError) as left_out:
        worst.of_bundle(bundled(failure=FAILURE), "onnx-int8", 2)

    assert f"over all 10,000 test rows it failed: {FAILURE}" in str(left_out.value)
    assert "--candidate runs/RUN/exports/FILE --data ROWS" in str(left_out.value)


def test_a_variant_that_there_never_was_is_told_with_those_there_are(bundled):
    with pytest.raises(UsageError, match="has no onnx-int4, expected one of onnx-float32, saved"):
        worst.of_bundle(bundled(), "onnx-int4", 2)


def test_nothing_is_advised_that_no_setting_does():
    assert all("calibrate" not in advice for advice in ADDED_UP.values())
