import numpy as np
import pytest

from pipeline import page
from pipeline.page import shown
from pipeline.page.evidence import Evidence


def test_a_variant_is_shown_with_the_figure_that_it_is_judged_by(garments):
    by_name = {one.report.variant: one for one in map(shown.variant, garments.manifest.parity)}

    whole, integers = by_name["onnx-float32"], by_name["onnx-int8"]
    assert whole.judged == whole.report.logits.max
    assert integers.judged == integers.report.logits.p999_low  # of few rows
    assert integers.share == pytest.approx(integers.judged / integers.report.budget.max_logit)


def test_what_never_ran_has_no_share(garments):
    broken = shown.variant(garments.manifest.parity[-1])

    assert not broken.ran
    assert np.isnan(broken.share)


def test_every_flip_that_is_shown_is_one_that_the_report_counts(garments):
    flips = {one.variant: one for one in shown.flips(garments.manifest, garments.found)}

    counted = {one.variant: one for one in garments.manifest.parity}
    assert "tflite-int8" in flips
    for name, one in flips.items():
        report = counted[name]
        unexplained = sum(float(flip.figure.split("\u00a0")[0]) > 100 for flip in one.shown)
        assert one.total == report.flips_explained + report.flips_unexplained
        assert len(one.shown) == min(8, one.total)
        assert unexplained == min(8, report.flips_unexplained)
        assert all(flip.uri and flip.before != flip.after for flip in one.shown)


@pytest.mark.parametrize(("classes", "table"), [(16, True), (17, False)])
def test_a_matrix_of_many_classes_is_a_picture(make_classifier, classes, table):
    made = make_classifier(classes)

    context = shown.context(made.manifest, made.found)

    assert bool(context["matrix"]) == table
    assert bool(context["matrix_image"]) != table


@pytest.mark.parametrize(("classes", "listed"), [(40, 40), (41, 40)])
def test_of_many_classes_the_weakest_are_listed(make_classifier, classes, listed):
    made = make_classifier(classes)

    found = shown.shown_classes(made.manifest.evaluation.classes)

    assert len(found) == listed
    if classes > listed:
        weakest = min(made.manifest.evaluation.classes, key=lambda one: one.f1)
        assert found[0] == weakest


def test_settings_that_are_no_json_are_none(garments):
    for text in ("{", "[1]", ""):
        garments.manifest.training.config = text
        assert shown.settings(garments.manifest) == {}


def test_a_bundle_without_evidence_shows_its_figures_and_no_images(garments):
    text = page.render(garments.manifest, Evidence.empty())

    assert "<img" not in text
    assert 'id="calibration"' not in text
    assert 'id="first-layer"' not in text
    assert f"test row {garments.manifest.evaluation.hardest[0].row}" in text


def test_a_model_that_does_not_classify_shows_what_makes_sense_for_it(line):
    text = page.render(line.manifest, line.found)

    for there in ("Mean squared error", "Answer and target", "Least close", 'id="parity"'):
        assert there in text
    for missing in ("Calibration", 'id="flips"', 'id="classes"', "agreement", "IMAGE.png"):
        assert missing not in text


def test_what_comes_least_close_has_its_error_and_the_largest_is_first(line):
    found = shown.worst(line.found)

    errors = [error for *_, error in found]
    apart = line.found.worst_targets[0] - line.found.worst_outputs[0]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(np.sqrt((apart**2).mean()), rel=1e-5)
    text = page.render(line.manifest, line.found)
    assert f"<td>{errors[0]:.4g}</td></tr>" in text
    assert "over the 2 outputs of a row" in text


def test_a_model_that_does_not_classify_has_no_accuracy_in_the_heading_of_its_cost(line, garments):
    numbers, classes = (page.render(one.manifest, one.found) for one in (line, garments))

    assert "<h2>Size and latency</h2>" in numbers
    assert "<h2>Accuracy, size and latency</h2>" in classes


def test_a_class_whose_name_ends_with_a_number_is_told_from_its_rows(make_classifier):
    made = make_classifier(labels=["kind 1", "kind 2"], classes=2)
    pair = made.manifest.evaluation.confused[0]

    text = page.render(made.manifest, made.found)

    assert f"<bdi>{pair.label}</bdi> as <bdi>{pair.predicted}</bdi> ({pair.rows})" in text


def test_a_variant_whose_answers_are_not_finite_is_shown(garments):
    for report in garments.manifest.parity:
        report.logits.max = report.logits.p999 = report.probabilities.max = float("nan")
        report.passed = False

    assert "not finite" in page.render(garments.manifest, garments.found)
