import io

import pytest
from rich.console import Console

from pipeline import report
from protos import bundle_pb2


@pytest.fixture
def manifest():
    manifest = bundle_pb2.BundleManifest(name="fashion-mnist", version=3)
    manifest.dataset.test_rows = 10_000
    manifest.evaluation.accuracy.value = 0.9034
    manifest.evaluation.size_bytes = 2_404_239
    manifest.evaluation.images_per_second = 8_895
    for variant in ("saved-model", "tflite-float32", "onnx-float32"):
        one = manifest.parity.add(variant=variant, size_bytes=794_275, agreement=1)
        one.accuracy.value, one.logits.max, one.images_per_second = 0.9034, 4.77e-6, 22_091
    manifest.served.CopyFrom(manifest.parity[-1])
    manifest.served.variant = "served"
    manifest.served.budget.max_logit = 1.03e-4
    return manifest


def test_the_original_is_the_first_row_and_the_served_model_the_last(manifest):
    names = [row[0] for row in report.rows(manifest)]

    assert names == [
        "original",
        "saved-model",
        "tflite-float32",
        "onnx-float32",
        "served (gRPC)",
    ]


def test_a_row_has_a_cell_for_every_column(manifest):
    assert {len(row) for row in report.rows(manifest)} == {len(report.COLUMNS)}
    assert report.rows(manifest)[-1][1:] == ("776 KiB", "90.34%", "100.00%", "4.77e-06", "22,091")


def test_nothing_is_cut_off_on_a_terminal_of_eighty_columns(manifest):
    screen = io.StringIO()

    Console(width=80, file=screen).print(report.table(manifest))

    assert "…" not in screen.getvalue()
    for column in report.COLUMNS:
        assert column in screen.getvalue()


def test_markdown_has_the_same_cells_and_the_path(manifest, tmp_path):
    text = report.markdown(manifest, tmp_path)

    assert str(tmp_path) in text
    for row in report.rows(manifest):
        assert f"| {' | '.join(row)} |" in text
