import functools
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline import parity
from pipeline.errors import ParityError
from protos import bundle_pb2
from service import agreement
from service.errors import ModelError

CLASSES = {
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
LOSSLESS = [name for name, precision in CLASSES.items() if precision == "float32"]


@pytest.fixture
def reports(checked):
    return {report.variant: report for report in map(parity.read_report, checked.reports)}


def test_every_export_of_a_real_model_passes_over_the_whole_test_set(reports):
    assert {name: report.failure for name, report in reports.items() if not report.passed} == {}
    assert {report.accuracy.rows for report in reports.values()} == {10_000}


def test_every_variant_is_held_to_the_budget_of_its_class(reports):
    found = {name: report.budget for name, report in reports.items()}

    assert {name: one.precision for name, one in found.items()} == CLASSES
    for one in found.values():
        assert one.coefficient == agreement.COEFFICIENT[one.precision]
        assert one.max_logit == one.coefficient * one.scale


def test_every_image_with_a_clear_margin_keeps_its_class(checked):
    with np.load(checked.answers) as answers:
        reference = answers["reference"]
        second, first = np.sort(reference, axis=1)[:, -2:].T
        clear = first - second > 2 * 1e-5 * checked.scale
        for variant in LOSSLESS:
            same = answers[variant].argmax(axis=1) == reference.argmax(axis=1)
            assert same[clear].all()


def test_the_budget_is_fixed_by_the_reference_alone(checked, reports):
    with np.load(checked.answers) as answers:
        scale = float(np.median(np.abs(answers["reference"]).max(axis=1)))

    assert {report.budget.scale for report in reports.values()} == {scale}
    assert checked.scale == scale


def test_hostile_inputs_are_asked_about_in_odd_batches(reports):
    for report in reports.values():
        assert report.hostile.rows == sum(report.hostile.batch_sizes) == 299
        if report.budget.precision != "int8":
            assert 0 <= report.hostile.max_logit <= report.budget.max_logit


def test_integers_are_further_off_than_halves_and_halves_than_floats(reports):
    off = {name: report.logits.mean for name, report in reports.items()}

    assert off["onnx-float32"] < off["onnx-float16"] < off["onnx-int8"]
    assert off["tflite-float32"] < off["tflite-float16"] < off["tflite-int8"]
    assert off["tflite-int16x8"] < off["tflite-int8"]


def test_hostile_inputs_are_black_white_two_checkerboards_and_noise():
    images = parity.hostile_images((4, 4, 3))

    assert images.shape == (299, 4, 4, 3)
    assert (images[0].max(), images[1].min()) == (0, 255)
    assert images[2][0, :2, 0].tolist() == [0, 255]
    assert (images[2].astype(int) + images[3] == 255).all()
    assert len(np.unique(images[4:])) == 256


@pytest.fixture
def check(no_cost):
    """Return the stage, without measuring what variants cost."""
    return functools.partial(parity.check, measure_cost=no_cost)


def only(exports, *variants):
    """Return exports of these alone."""
    return replace(exports, variants=variants)


def sabotage(exports, tmp_path, change):
    """Return the SavedModel, and the ONNX file with one float initializer changed."""
    variant = exports.named("onnx-float32")
    model = onnx.load(variant.path)
    weights = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT]
    change(model, weights)
    path = tmp_path / "model.float32.onnx"
    onnx.save(model, path)
    return only(exports, exports.named("saved-model"), replace(variant, path=path))


def drop_bias(model, weights):
    bias = next(one for one in weights if numpy_helper.to_array(one).size == 100)
    zeros = np.zeros_like(numpy_helper.to_array(bias))
    bias.CopyFrom(numpy_helper.from_array(zeros, bias.name))


def double_scale(model, weights):
    kernel = next(one for one in weights if numpy_helper.to_array(one).ndim == 4)  # it is in there
    doubled = numpy_helper.to_array(kernel) * np.float32(2)
    kernel.CopyFrom(numpy_helper.from_array(doubled, kernel.name))


def flip_exponent_bit(model, weights):
    dense = max(weights, key=lambda one: numpy_helper.to_array(one).size)
    array = numpy_helper.to_array(dense).copy()
    array.view(np.uint32).reshape(-1)[7] ^= 1 << 30
    dense.CopyFrom(numpy_helper.from_array(array, dense.name))


@pytest.mark.parametrize("change", [drop_bias, double_scale, flip_exponent_bit])
def test_a_changed_export_fails_the_run_and_its_report_is_kept(
    check, trained, exports, data, scores, tmp_path, change
):
    broken = sabotage(exports, tmp_path, change)

    with pytest.raises(ParityError, match=r"onnx-float32: max .Δlogit. is"):
        check(trained, broken, data, tmp_path / "parity", scores)

    report = parity.read_report(tmp_path / "parity" / "onnx-float32.json")
    assert not report.passed
    assert report.logits.max > report.budget.max_logit
    assert parity.read_report(tmp_path / "parity" / "saved-model.json").passed


def test_a_required_file_that_does_not_load_fails_the_run_in_a_sentence(
    check, trained, exports, data, scores, tmp_path
):
    broken = exports.named("tflite-float32")
    path = tmp_path / "model.tflite"
    path.write_bytes(broken.path.read_bytes()[:2_000])

    with pytest.raises(
        ParityError,
        match=r"published, tflite-float32: model\.tflite cannot be run: TFLite's runtime says: ",
    ):
        check(
            trained, only(exports, exports.named("onnx-float32"), replace(broken, path=path)), data,
            tmp_path / "parity", scores,
        )  # fmt: skip


def test_an_optional_file_that_does_not_load_is_reported_and_fails_no_run(
    check, trained, exports, data, scores, tmp_path
):
    broken = exports.named("onnx-int8")
    path = tmp_path / "model.int8.onnx"
    path.write_bytes(broken.path.read_bytes()[:2_000])

    checked = check(
        trained, only(exports, exports.named("onnx-float32"), replace(broken, path=path)), data,
        tmp_path / "parity", scores,
    )  # fmt: skip

    report = parity.read_report(checked.reports[1])
    assert (report.variant, report.passed, report.accuracy.rows) == ("onnx-int8", False, 0)
    assert report.failure.startswith("model.int8.onnx cannot be run: onnxruntime")
    with np.load(checked.answers) as answers:
        assert "onnx-int8" not in answers.files


def test_what_could_not_be_exported_has_a_report_that_says_why(
    check, trained, exports, data, scores, tmp_path
):
    gone = replace(exports.named("tflite-int8"), path=tmp_path / "none", failure="no such operator")

    checked = check(
        trained, only(exports, exports.named("onnx-float32"), gone), data, tmp_path, scores
    )

    report = parity.read_report(checked.reports[1])
    assert (report.variant, report.failure, report.passed) == ("tflite-int8", "no such operator", 0)
    assert report.budget.precision == "int8"


def test_weights_beyond_float16_fail_those_variants_and_not_the_run(overflowing):
    reports = {report.variant: report for report in map(parity.read_report, overflowing[3].reports)}

    for name in ("tflite-float16", "onnx-float16"):
        assert re.search(r"reaches .*, float16 ends at 65504", reports[name].failure)
    assert all(reports[name].passed for name in LOSSLESS)


def test_a_variant_that_is_to_be_served_is_required(
    check, trained, exports, data, scores, tmp_path
):
    gone = replace(exports.named("onnx-int8"), failure="no such operator")

    with pytest.raises(ParityError, match="onnx-int8: no such operator"):
        check(trained, only(exports, gone), data, tmp_path / "parity", scores, serve="onnx-int8")


def test_the_served_variant_gives_the_budget_that_is_served(
    check, trained, exports, data, scores, tmp_path
):
    checked = check(
        trained, only(exports, exports.named("onnx-int8")), data, tmp_path, scores, "onnx-int8"
    )

    assert (checked.served_variant, checked.precision) == ("onnx-int8", "int8")


def test_weights_that_were_not_evaluated_are_refused(
    check, trained, exports, data, scores, tmp_path
):
    other = replace(scores, sha256="0" * 64)

    with pytest.raises(ParityError, match=r"the model exported has sha256 .*0000… was evaluated"):
        check(trained, exports, data, tmp_path, other)
    with pytest.raises(ParityError, match=r"the model exported has sha256 "):
        check(trained, replace(exports, parent_sha256="1" * 64), data, tmp_path, scores)


def test_a_reference_of_other_weights_is_refused(
    check, overflowing, exports, data, scores, tmp_path
):
    large = overflowing[0]

    with pytest.raises(ParityError, match="the model held against them has sha256"):
        check(large, exports, data, tmp_path, scores)


def test_an_accuracy_that_is_not_the_evaluations_is_refused(
    check, trained, exports, data, scores, tmp_path
):
    with pytest.raises(ParityError, match=r"gets \d+ of 10000 test images right, the"):
        check(trained, exports, data, tmp_path, replace(scores, correct=scores.correct - 100))


def test_the_options_of_a_variant_reach_the_session(exports):
    odd = replace(exports.named("onnx-int8"), session=(("session.no_such_option", "1"),))

    with pytest.raises(ModelError, match="no_such_option"):
        parity.runner(odd)


def timed(name, p50_of_64, p50_of_1=0.001, *, passed=True):
    report = bundle_pb2.ParityReport(variant=name, passed=passed)
    report.latencies.add(rows=1, p50_seconds=p50_of_1)
    report.latencies.add(rows=64, p50_seconds=p50_of_64)
    return report


@pytest.mark.parametrize(
    ("others", "best"),
    [
        ([timed("onnx-int8", 0.0094)], "onnx-int8"),
        ([timed("onnx-int8", 0.0096)], "onnx-float32"),  # as fast, within what clocks are worth
        ([timed("onnx-int8", 0.002, passed=False)], "onnx-float32"),
        ([timed("tflite-int8", 0.002)], "onnx-float32"),  # nothing serves it
        ([timed("onnx-int8", 0.0096, 0.0005)], "onnx-int8"),  # one row decides
        ([timed("onnx-int8", 0.02, 0.0005)], "onnx-float32"),  # but not where 64 are slower
        ([timed("onnx-int8", 0.009), timed("onnx-float16", 0.008)], "onnx-float16"),
        ([bundle_pb2.ParityReport(variant="onnx-int8", passed=True)], "onnx-float32"),
    ],
)
def test_the_best_variant_passed_and_is_faster_beyond_doubt(others, best):
    reports = {one.variant: one for one in (timed("onnx-float32", 0.01), *others)}

    assert parity.fastest(reports) == best


def test_every_report_that_passed_says_what_its_variant_costs(reports):
    for report in reports.values():
        assert report.peak_rss_kib == 1
        assert [one.rows for one in report.latencies] == [1, 8, 64]


def test_what_cannot_be_measured_passes_all_the_same(
    trained, exports, data, scores, tmp_path, caplog
):
    def broken(variant, rows, options):
        raise ParityError("model.onnx cannot be measured: no memory")

    few = only(exports, exports.named("onnx-float32"))
    checked = parity.check(trained, few, data, tmp_path, scores, "best", broken)

    assert checked.served_variant == "onnx-float32"
    assert not parity.read_report(checked.reports[0]).latencies
    assert "no memory; its report says nothing about it" in caplog.text


def test_hostile_numbers_are_zeros_ones_and_twice_the_range_of_the_data():
    inputs = np.linspace(-1, 3, 10, dtype=np.float32).reshape(5, 2)

    rows = parity.hostile_rows(inputs)

    assert rows.shape == (299, 2)
    assert rows.dtype == np.float32
    assert rows[:4, 0].tolist() == [0, 1, -3, 5]
    assert rows.min() >= -3
    assert rows.max() <= 5
    assert len(np.unique(rows[4:])) > 500
