import json
import zipfile
from dataclasses import replace

import pytest
import tensorflow as tf

from pipeline.errors import ExportError
from pipeline.export import calibration, metadata
from pipeline.export.metadata import Metadata

OWN = {"variant", "precision", "session", "calibration.sha256"}


@pytest.fixture(scope="module")
def texts(exports):
    """What every file says, read from the files alone."""
    return {variant.name: Metadata.read(variant).texts for variant in exports.variants}


def test_all_files_say_the_same_but_for_what_they_are(texts):
    common = [{name: one[name] for name in one.keys() - OWN} for one in texts.values()]

    assert len(common) == 9
    assert all(one == common[0] for one in common)


def test_every_file_says_which_variant_it_is(texts, exports):
    for variant in exports.variants:
        said = texts[variant.name]
        assert (said["variant"], said["precision"]) == (variant.name, variant.precision)
        assert json.loads(said["session"]) == dict(variant.session)


def test_files_with_integers_name_the_images_their_ranges_come_from(texts, exports, data):
    named = {name for name, one in texts.items() if "calibration.sha256" in one}

    assert named == {"tflite-int8", "tflite-int16x8", "onnx-int8"}
    expected = calibration.choose(data).sha256
    assert {texts[name]["calibration.sha256"] for name in named} == {expected}
    assert json.loads(exports.calibration.read_bytes())["sha256"] == expected


def test_metadata_names_labels_data_parent_run_versions_and_licence(texts, data, trained):
    for said in texts.values():
        assert json.loads(said["labels"]) == list(data.labels)
        assert said["dataset.sha256"] == data.sha256
        assert said["dataset.license"] == "MIT"
        assert said["parent.sha256"] == trained.sha256
        assert said["run"] == "run-1"
        assert said["version.tensorflow"] == tf.__version__


@pytest.mark.parametrize("name", ["saved-model", "tflite-int8", "onnx-float16"])
def test_labels_in_another_order_are_refused(exports, data, trained, name):
    other = replace(data, labels=data.labels[::-1])

    with pytest.raises(ExportError, match=r"names the classes \['T-shirt.*expected \['Ankle boot'"):
        metadata.check(exports.named(name), other, trained.sha256)


def test_another_parent_is_refused(exports, data):
    with pytest.raises(ExportError, match=r"says it comes from [0-9a-f]{64}, expected 0000"):
        metadata.check(exports.named("onnx-float32"), data, "0" * 64)


def test_a_file_without_metadata_is_refused_by_name(exports, data, trained, tmp_path):
    lite = exports.named("tflite-float32")
    with zipfile.ZipFile(lite.path) as archive:
        cut = archive.infolist()[0].header_offset
    bare = tmp_path / "bare.tflite"
    bare.write_bytes(lite.path.read_bytes()[:cut])

    with pytest.raises(ExportError, match=r"bare\.tflite has no metadata that can be read"):
        metadata.check(replace(lite, path=bare), data, trained.sha256)
