import io

import pytest
from rich.console import Console

from pipeline import report
from protos import bundle_pb2

PRECISION = {
    "saved-model": "float32",
    "tflite-float32": "float32",
    "tflite-float16": "float16",
    "tflite-dynamic-range": "int8",
    "tflite-int8": "int8",
    "tflite-int16x8": "int8",
    "onnx-float32": "float32",
    "onnx-float16": "float16",
    "onnx-int8": "int8",
}


@pytest.fixture
def manifest():
    manifest = bundle_pb2.BundleManifest(name="fashion-mnist", version=3)
    manifest.dataset.test_rows = 10_000
    manifest.evaluation.accuracy.value = 0.9034
    manifest.evaluation.size_bytes = 2_404_239
    manifest.evaluation.images_per_second = 8_895
    for place, (variant, precision) in enumerate(PRECISION.items(), start=1):
        one = manifest.parity.add(
            variant=variant, size_bytes=794_275, agreement=1, passed=True, images_per_second=22_091
        )
        one.accuracy.value, one.accuracy.rows = 0.9034, 10_000
        one.budget.precision, one.budget.max_logit = precision, 1.03e-4
        one.logits.max, one.logits.p999, one.logits.mean = 4.77e-6, 2e-6, place * 1e-7
    manifest.served.CopyFrom(named(manifest, "onnx-float32"))
    manifest.served.variant = "served"
    return manifest


def named(manifest, variant):
    return next(report for report in manifest.parity if report.variant == variant)


def test_the_original_is_the_first_row_and_the_served_model_the_last(manifest):
    names = [row[0] for row in report.rows(manifest)]

    assert names == ["original", *PRECISION, "served (gRPC)"]


def test_a_row_has_a_cell_for_every_column(manifest):
    assert {len(row) for row in report.rows(manifest)} == {len(report.COLUMNS)}
    assert report.rows(manifest)[-1][1:] == (
        "776 KiB", "90.34%", "100.00%", "4.8e-06", "1.0e-04", "22,091",
    )  # fmt: skip


def test_the_figure_that_is_judged_is_shown(manifest):
    shown = {row[0]: row[4] for row in report.rows(manifest)}

    assert shown["onnx-float16"] == "4.8e-06"
    assert shown["onnx-int8"] == "2.0e-06"


@pytest.mark.parametrize(
    ("size_bytes", "shown"), [(999, "1 KiB"), (2_404_239, "2.3 MiB"), (250 << 20, "250 MiB")]
)
def test_a_size_takes_few_characters(manifest, size_bytes, shown):
    manifest.evaluation.size_bytes = size_bytes

    assert report.rows(manifest)[0][1] == shown


def test_nothing_is_remarked_where_nothing_is_odd(manifest):
    assert report.remarks(manifest) == [
        "|Δlogit| is the largest; of variants with integers the 99.9th percentile"
    ]


def test_what_failed_says_so_and_why(manifest):
    failed, unborn = named(manifest, "onnx-float16"), named(manifest, "tflite-int8")
    failed.passed, failed.failure = False, "a logit is not finite"
    unborn.Clear()
    unborn.variant, unborn.failure = "tflite-int8", "no such operator"

    cells = {row[0]: row for row in report.rows(manifest)}

    assert "failed" in cells["onnx-float16"]
    assert "failed" in cells["tflite-int8"]
    assert report.remarks(manifest)[1:] == [
        "tflite-int8 is not in the bundle: no such operator",
        "onnx-float16 is not in the bundle: a logit is not finite",
    ]


def test_dynamic_range_that_quantised_nothing_is_labelled(manifest):
    dynamic, usual = named(manifest, "tflite-dynamic-range"), named(manifest, "tflite-float32")
    dynamic.logits.CopyFrom(usual.logits)

    assert report.remarks(manifest)[1:] == [
        "tflite-dynamic-range is tflite-float32 again: it quantised nothing"
    ]


def test_int8_that_is_bigger_or_slower_is_labelled(manifest):
    named(manifest, "onnx-int8").size_bytes = 800_000
    named(manifest, "onnx-int8").images_per_second = 11_045.5
    named(manifest, "tflite-int8").images_per_second = 21_000

    assert report.remarks(manifest)[1:] == [
        "onnx-int8 is bigger than onnx-float32 and 2.0 times slower than onnx-float32"
    ]


def test_nothing_is_cut_off_on_a_terminal_of_eighty_columns(manifest):
    screen = io.StringIO()

    Console(width=80, file=screen).print(report.table(manifest))

    assert "…" not in screen.getvalue()
    assert max(map(len, screen.getvalue().splitlines())) <= 80
    for column in report.COLUMNS:
        assert column in screen.getvalue()


def test_markdown_has_the_same_cells_and_the_path(manifest, tmp_path):
    text = report.markdown(manifest, tmp_path)

    assert str(tmp_path) in text
    for row in report.rows(manifest):
        assert f"| {' | '.join(row)} |" in text
