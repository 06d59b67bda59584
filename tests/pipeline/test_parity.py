from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline import parity
from pipeline.errors import ParityError

VARIANTS = ["saved-model", "tflite-float32", "onnx-float32"]


@pytest.fixture
def reports(checked):
    return {report.variant: report for report in map(parity.read_report, checked.reports)}


def test_every_export_of_a_real_model_passes_over_the_whole_test_set(reports):
    assert list(reports) == VARIANTS
    assert all(report.passed for report in reports.values())
    assert {report.accuracy.rows for report in reports.values()} == {10_000}


def test_every_image_with_a_clear_margin_keeps_its_class(checked):
    with np.load(checked.answers) as answers:
        reference = answers["reference"]
        second, first = np.sort(reference, axis=1)[:, -2:].T
        clear = first - second > 2 * 1e-5 * checked.scale
        for variant in VARIANTS:
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
        assert report.hostile.max_logit <= report.budget.max_logit


def test_hostile_inputs_are_black_white_two_checkerboards_and_noise():
    images = parity.hostile_images((4, 4, 3))

    assert images.shape == (299, 4, 4, 3)
    assert (images[0].max(), images[1].min()) == (0, 255)
    assert images[2][0, :2, 0].tolist() == [0, 255]
    assert (images[2].astype(int) + images[3] == 255).all()
    assert len(np.unique(images[4:])) == 256


def sabotage(exports, tmp_path, change):
    """Return the exports with one float initializer of the ONNX file changed."""
    model = onnx.load(exports.onnx)
    weights = [one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT]
    change(model, weights)
    path = tmp_path / "model.float32.onnx"
    onnx.save(model, path)
    return replace(exports, onnx=path)


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
    trained, exports, data, tmp_path, change
):
    broken = sabotage(exports, tmp_path, change)

    with pytest.raises(ParityError, match=r"onnx-float32: max .Δlogit. is"):
        parity.check(trained, broken, data, tmp_path / "parity")

    report = parity.read_report(tmp_path / "parity" / "onnx-float32.json")
    assert not report.passed
    assert report.logits.max > report.budget.max_logit
    assert parity.read_report(tmp_path / "parity" / "tflite-float32.json").passed


def test_a_tflite_file_that_does_not_load_is_a_sentence(trained, exports, data, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(exports.tflite.read_bytes()[:2_000])

    with pytest.raises(ParityError, match=r"model\.tflite cannot be run by TFLite's runtime: "):
        parity.check(trained, replace(exports, tflite=path), data, tmp_path / "parity")
