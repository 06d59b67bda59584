import math

import pytest
from rich.console import Console

from protos import parity_pb2
from service import agreement, tables

BUDGET = agreement.Budget("float32", 10.0).message()  # 1e-4


@pytest.fixture
def version():
    """Parity of one version: a variant, a self-check, and what a shadow reports."""
    one = parity_pb2.VersionParity(model="m", version="7")
    for report, name in (
        (one.variants.add(), "onnx-float32"),
        (one.self_check.report, "self-check"),
    ):
        report.variant, report.passed, report.agreement = name, True, 1.0
        report.budget.CopyFrom(BUDGET)
        report.accuracy.rows, report.accuracy.value = 10_000, 0.9
        report.reference_accuracy.rows = 10_000
        report.logits.max = 5e-5
    one.self_check.cpu, one.self_check.cpu_flags[:] = "Fast", ["avx2", "fma"]
    one.self_check.session.graph_optimization = "all"
    live = one.live
    live.budget.CopyFrom(BUDGET)
    live.verdict, live.window_s = parity_pb2.LIVE_VERDICT_PASSED, 300
    live.window.rows, live.window.agreed, live.window.max_logit = 1_000, 999, 2e-5
    live.window.flips_explained = 1
    live.window.sum_confidence = 800.0
    live.window.predicted[:] = [400, 600]
    live.total.rows = 5_000
    return one


def shown(*versions, width=80):
    console = Console(width=width, no_color=True)
    with console.capture() as captured:
        console.print(tables.parity_view(parity_pb2.GetParityResponse(versions=versions)))
    return captured.get()


def row(text, name):
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_parity_fits_eighty_columns_whole(version):
    version.variants[0].variant = "tflite-dynamic-range"
    version.variants.add().CopyFrom(version.variants[0])
    version.variants[1].flips_explained, version.variants[1].flips_unexplained = 35, 2

    text = shown(version)

    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_difference_is_shown_as_its_share_of_the_budget(version):
    text = shown(version)

    assert row(text, "onnx-float32") == [
        "onnx-float32", "90.00%", "100.00%", "5e-05", "█▌", "50%", "0", "passed",
    ]  # fmt: skip
    assert row(text, "live,") == [
        "live,", "1,000", "99.90%", "2e-05", "▋", "20%", "1", "passed",
    ]  # fmt: skip


@pytest.mark.parametrize("far", [2e-4, math.inf, math.nan])
def test_what_is_over_its_budget_says_so(version, far):
    version.variants[0].logits.max = far

    assert "over" in row(shown(version), "onnx-float32")


def test_integers_are_shown_by_the_percentile_that_judges_them(version):
    report = version.variants[0]
    report.budget.CopyFrom(agreement.Budget("int8", 10.0).message())  # 0.5
    report.logits.max, report.logits.p999 = 2.0, 0.25

    assert row(shown(version), "onnx-float32")[3:6] == ["0.25", "█▌", "50%"]


def test_flips_that_nothing_explains_stand_apart(version):
    version.variants[0].flips_explained, version.variants[0].flips_unexplained = 3, 2

    assert "3 + 2" in shown(version)


def test_why_something_failed_stands_below_the_table(version):
    version.variants[0].passed, version.variants[0].failure = False, "it is far off"
    version.live.verdict, version.live.failure = parity_pb2.LIVE_VERDICT_FAILED, "a flip"

    text = shown(version)

    assert row(text, "live,")[-1] == "failed"
    assert "onnx-float32 failed: it is far off" in text
    assert "live failed: a flip" in text


def test_the_host_that_checked_is_named_with_what_its_kernels_depend_on(version):
    text = shown(version, width=120)

    assert "self-check on Fast, 0 threads" in text
    assert "avx2 fma; graph all" in text


@pytest.mark.parametrize(
    ("index", "said"), [(0.02, "little (0.02)"), (0.1, "some (0.10)"), (0.25, "much (0.25)")]
)
def test_drift_is_said_in_words(version, index, said):
    version.live.predicted_psi = index

    assert f"classes have drifted {said}" in shown(version, width=200)


def test_mean_confidence_and_dropped_rows_are_told(version):
    version.live.dropped = 12_345

    text = shown(version, width=200)

    assert "mean confidence 80.0%" in text
    assert "12,345 rows dropped" in text


def test_without_a_report_in_the_window_nothing_is_claimed(version):
    version.live.window.Clear()
    version.live.verdict = parity_pb2.LIVE_VERDICT_UNSPECIFIED

    assert row(shown(version), "live") == ["live", "unknown"]


def test_a_server_that_has_loaded_nothing_says_so():
    assert "nothing is loaded" in shown()


def test_what_does_not_classify_has_no_accuracy_and_no_flips(version):
    for report in (version.variants[0], version.self_check.report):
        report.reference_accuracy.rows = 0

    assert row(shown(version), "onnx-float32")[1] == "5e-05"
