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


@pytest.fixture
def full(manifest):
    """The same with all that later versions of the pipeline know."""
    found, training = manifest.evaluation, manifest.training
    manifest.kind = bundle_pb2.KIND_CLASSIFIER
    found.accuracy.low, found.accuracy.high, found.accuracy.rows = 0.8974, 0.909, 10_000
    found.loss, found.calibration_error = 0.27311, 0.01234
    for label, f1 in (("Trouser", 0.98), ("Shirt|es", 0.72)):
        found.classes.add(label=label, rows=1_000, precision=f1, recall=f1, f1=f1)
        found.confusion.add(predicted=[980, 20])
    for rows in (121, 80, 75, 60):
        found.confused.add(label="Shirt|es", predicted="Trouser", rows=rows)
    found.hardest.add(row=17, label="Shirt|es", predicted="Trouser", probability=0.99987)
    found.champion.version, found.champion.correct, found.champion.mcnemar_p = 2, 9_000, 0.17
    found.champion.only_new, found.champion.only_champion = 1_300, 1_266
    training.architecture, training.parameters = "conv10-dropout", 1_101_526
    training.multiply_adds, training.device, training.best_epoch = 14_200_000, "CPU", 9
    for number in range(10):
        training.history.add(number=number, seconds=20.2)
    for place, one in enumerate(manifest.parity):
        one.load_seconds, one.peak_rss_kib = 0.0412 * 10**place, 123_456
        for rows in (1, 8, 64):
            one.latencies.add(rows=rows, p50_seconds=0.00021 * rows, p99_seconds=0.01 * rows)
    del manifest.parity[4:]
    return manifest


@pytest.fixture
def generic(full):
    full.kind = bundle_pb2.KIND_GENERIC
    for field in ("classes", "confusion", "confused", "hardest", "champion", "accuracy"):
        full.evaluation.ClearField(field)
    return full


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


def test_what_is_known_of_the_original_is_said(full):
    assert report.facts(full) == [
        ("network", "conv10-dropout, 1,101,526 parameters, 14.2 M multiply-adds"),
        ("trained", "10 epochs in 202 s on CPU, the best is epoch 9"),
        ("accuracy", "90.34%, 95 % interval 89.74% to 90.90%"),
        ("loss", "0.2731"),
        ("calibration error", "0.0123"),
        ("weakest class", "Shirt|es, F1 0.720"),
        ("most confused", ", ".join(f"Shirt|es as Trouser {rows}" for rows in (121, 80, 75))),
        ("champion", "version 2: 90.00%; right only now 1,300, only then 1,266, p 0.17"),
    ]


def test_what_is_not_known_is_not_said(manifest):
    assert report.facts(manifest) == [("loss", "0")]
    assert report.speeds(manifest).rows == ()
    assert report.evaluated(manifest.evaluation) == []


def test_a_small_network_has_its_multiply_adds_counted(full):
    full.training.multiply_adds = 999_999

    assert report.facts(full)[0][1].endswith(", 999,999 multiply-adds")


def test_a_model_that_does_not_classify_is_judged_by_differences_alone(generic):
    named(generic, "tflite-float16").passed = False
    bare = named(generic, "tflite-float32")
    bare.passed = False
    bare.ClearField("accuracy")

    assert report.formats(generic).columns == report.GENERIC_COLUMNS
    assert [row[2] for row in report.rows(generic)] == [
        "", "passed", "failed", "failed", "passed", "passed",
    ]  # fmt: skip
    assert report.rows(generic)[1] == (
        "saved-model", "776 KiB", "passed", "4.8e-06", "1.0e-04", "22,091",
    )  # fmt: skip
    assert report.rows(generic)[2] == ("tflite-float32", "", "failed", "", "1.0e-04", "")
    assert report.facts(generic)[-1] == ("mean squared error", "0.2731")
    assert report.remarks(generic)[0].startswith("|Δ| is the largest")
    assert report.formats(generic).title == "fashion-mnist version 3, on 10,000 test rows"


def test_what_was_measured_of_speed_has_a_row_and_what_was_not_has_none(full):
    named(full, "tflite-float16").ClearField("latencies")
    named(full, "saved-model").ClearField("load_seconds")
    named(full, "saved-model").ClearField("latencies")

    sheet = report.speeds(full)

    assert sheet.columns == ("format", "load", "1 row", "8 rows", "64 rows", "peak RSS")
    assert sheet.rows == (
        ("tflite-float32", "412", "0.21/10.0", "1.68/80.0", "13.4/640", "121 MiB"),
        ("tflite-float16", "4120", "", "", "", "121 MiB"),
        ("tflite-dynamic-range", "41200", "0.21/10.0", "1.68/80.0", "13.4/640", "121 MiB"),
    )


def test_a_matrix_too_wide_to_be_read_is_left_out(full):
    found = full.evaluation
    titles = [sheet.title for sheet in report.evaluated(found)]
    for number in range(19):
        found.classes.add(label=str(number))
        found.confusion.add(predicted=[0] * 21)

    assert len(found.classes) == report.MATRIX_CLASSES + 1
    assert titles == [
        "classes", "true class, and what it was taken for", "most confused",
        "most confident mistakes",
    ]  # fmt: skip
    assert [sheet.title for sheet in report.evaluated(found)] == [titles[0], *titles[2:]]


@pytest.mark.parametrize("which", ["manifest", "full", "generic"])
def test_nothing_is_cut_off_on_a_terminal_of_eighty_columns(which, request):
    shown = request.getfixturevalue(which)
    screen = io.StringIO()

    Console(width=80, file=screen).print(report.table(shown))

    assert "…" not in screen.getvalue()
    assert max(map(len, screen.getvalue().splitlines())) <= 80
    for column in (
        *report.formats(shown).columns,
        *(report.speeds(shown).columns * bool(report.speeds(shown).rows)),
    ):
        assert column in screen.getvalue()
    assert "Shirt|es" in screen.getvalue() or which != "full"


@pytest.mark.parametrize("which", ["manifest", "full", "generic"])
def test_markdown_has_the_same_cells_and_the_path(which, request, tmp_path):
    shown = request.getfixturevalue(which)

    text = report.markdown(shown, tmp_path)

    assert str(tmp_path) in text
    for row in (*report.rows(shown), *report.speeds(shown).rows):
        assert f"| {' | '.join(row)} |" in text


def test_a_label_breaks_no_table_of_markdown(full, tmp_path):
    full.evaluation.classes[0].label = "a|b\nc"

    text = report.markdown(full, tmp_path)

    assert "| a\\|b c | 1,000 | 0.9800 | 0.9800 | 0.9800 |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in tables[:3]}) == 1
