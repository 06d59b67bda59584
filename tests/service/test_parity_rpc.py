import json

import pytest

from protos import bundle_pb2, parity_pb2
from service.errors import InvalidRequestError, ModelNotFoundError, ModelNotReadyError
from service.model_config import VersionPolicy
from service.parity_rpc import get_parity, properties


@pytest.fixture
def several(make_bundle, open_repository):
    """tiny 1 and 10 and other 1 are ready, tiny 11 is refused."""

    def serve(manifest):
        manifest.served.CopyFrom(bundle_pb2.ParityReport(variant="served", passed=True))

    make_bundle(name="other")
    make_bundle(version=10, edit=serve)
    make_bundle(version=11).joinpath("model.onnx").unlink()
    return open_repository(make_bundle().parents[1], policy=VersionPolicy())


def asked(repository, **fields):
    answer = get_parity(repository, parity_pb2.GetParityRequest(**fields))
    return [(version.model, version.version) for version in answer.versions]


def test_parity_of_everything_comes_by_name_and_number(several):
    assert asked(several) == [("other", "1"), ("tiny", "1"), ("tiny", "10")]


def test_parity_of_a_model_is_that_of_its_ready_versions(several):
    assert asked(several, model="tiny") == [("tiny", "1"), ("tiny", "10")]
    assert asked(several, model="tiny", version="1") == [("tiny", "1")]


def test_version_without_a_model_is_refused(several):
    with pytest.raises(InvalidRequestError) as caught:
        asked(several, version="1")

    assert str(caught.value) == "version is '1' without a model; name the model as well"


def test_parity_of_what_is_not_served_is_refused(several):
    with pytest.raises(ModelNotFoundError):
        asked(several, model="none")
    with pytest.raises(ModelNotFoundError):
        asked(several, model="tiny", version="2")
    with pytest.raises(ModelNotReadyError):
        asked(several, model="tiny", version="11")
    with pytest.raises(InvalidRequestError):
        asked(several, model="tiny", version="x")


def test_alias_names_a_version(several, tmp_path):
    (tmp_path / "models" / "tiny" / "aliases.json").write_text('{"champion": 1}')
    several.reconcile()

    assert asked(several, model="tiny", version="champion") == [("tiny", "1")]
    assert asked(several, model="tiny") == [("tiny", "1"), ("tiny", "10")]


def test_generic_model_has_parity_and_properties_too(make_generic_bundle, open_repository):
    repository = open_repository(make_generic_bundle().parents[1])

    (one,) = get_parity(repository, parity_pb2.GetParityRequest(model="line")).versions
    said = properties(repository.get("line", ""))

    assert one.self_check.report.passed
    assert json.loads(said["labels"]) == []
    assert said["max_batch_rows"] == "8"


def test_answer_holds_what_was_published_and_what_this_host_measured(several):
    one, ten = get_parity(several, parity_pb2.GetParityRequest(model="tiny")).versions

    assert [report.variant for report in one.variants] == ["onnx-float32"]
    assert not one.HasField("served")
    assert ten.served.variant == "served"
    assert one.self_check.report.variant == "self-check"
    assert one.self_check == several.get("tiny", "1").self_check


def test_properties_say_what_the_manifest_and_the_self_check_say(make_bundle, open_repository):
    def edit(manifest):
        manifest.dataset.name, manifest.dataset.sha256 = "noise", "d1"
        manifest.provenance.parent_sha256, manifest.provenance.run = "d2", "r1"

    served = open_repository(make_bundle(edit=edit).parents[1], max_batch_rows=5).get("tiny", "")
    said = properties(served)

    model = next(file for file in served.manifest.files if file.path == "model.onnx")
    assert json.loads(said["labels"]) == ["dark", "light", "striped"]
    assert said["max_batch_rows"] == "5"
    assert said["model.sha256"] == model.sha256
    assert (said["dataset.name"], said["dataset.sha256"]) == ("noise", "d1")
    assert (said["parent.sha256"], said["run"]) == ("d2", "r1")
    assert (said["parity.variant"], said["parity.rows"]) == ("onnx-float32", "12")
    assert said["parity.accuracy"] == said["parity.reference_accuracy"] == "1"
    assert said["parity.agreement"] == "1"
    assert said["parity.max_logit_difference"] == "0"
    budget = served.manifest.parity[0].budget.max_logit
    assert float(said["parity.max_logit_budget"]) == pytest.approx(budget, rel=1e-5)
    assert float(said["parity.self_check.max_logit_difference"]) <= budget
    assert said["parity.self_check.checked"] == served.self_check.checked
    assert len(said) == 16
