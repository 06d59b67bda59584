import json
import threading

import numpy as np
import pytest

from protos import bundle_pb2, parity_pb2
from service import agreement
from service.errors import (
    InvalidRequestError,
    LimitError,
    ModelNotFoundError,
    ModelNotReadyError,
    PreconditionError,
    ServiceError,
)
from service.model_config import VersionPolicy
from service.parity_rpc import (
    MAX_WATCHERS,
    MESSAGE_BYTES,
    MESSAGE_ROWS,
    Streams,
    get_parity,
    properties,
    report_shadow,
)
from service.sampling import Sampling


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
    assert said["parity.output"] == "logits"
    assert len(said) == 17


# Shadows


@pytest.fixture
def sampled(make_bundle, open_repository):
    """tiny 1 and 2 of a server that samples every row; 3 is refused."""

    def edit(manifest):
        manifest.provenance.parent_sha256 = "ab"

    make_bundle(version=2, edit=edit)
    make_bundle(version=3).joinpath("model.onnx").unlink()
    root = make_bundle(edit=edit).parents[1]
    return open_repository(root, policy=VersionPolicy(), sampling=Sampling(rate=1.0))


def shown(repository, number, images, tiny):
    """Let a version's rows be sampled."""
    batcher = repository.get("tiny", str(number)).batcher
    batcher.sample(images, {"logits": tiny.logits(images)})


def rows_due(stream):
    return [parity_pb2.SampledRows.FromString(content) for content in stream.due()]


def report(repository, rows=1, **fields):
    logits, inputs = np.eye(3, dtype=np.float32)[[0] * rows], np.zeros((rows, 2, 2, 1), np.uint8)
    allowed = agreement.Budget("float32", 1.0)
    figures = agreement.figures(logits, logits, inputs, allowed=allowed)
    usual = {"model": "tiny", "version": "1", "parent_sha256": "ab", "figures": figures}
    report_shadow(repository, parity_pb2.ReportShadowRequest(**{**usual, **fields}))


def test_sampled_rows_are_sent_with_what_tells_them_from_others(sampled, tiny):
    stream = Streams(sampled).sample(parity_pb2.SampleTrafficRequest())
    assert rows_due(stream) == []
    images = tiny.images(5)
    shown(sampled, 1, images[:2], tiny)
    shown(sampled, 1, images[2:4], tiny)
    shown(sampled, 2, images[4:], tiny)

    first, second = rows_due(stream)

    assert (first.model, first.version, first.parent_sha256) == ("tiny", "1", "ab")
    assert (first.rows, first.input, first.dropped) == (4, images[:4].tobytes(), 0)
    assert first.output == tiny.logits(images[:4]).tobytes()
    assert (second.version, second.rows) == ("2", 1)
    stream.close()


def test_message_of_rows_has_its_limits(sampled, tiny):
    stream = Streams(sampled).sample(parity_pb2.SampleTrafficRequest(model="tiny"))
    shown(sampled, 1, tiny.images(2 * MESSAGE_ROWS + 1), tiny)
    batcher = sampled.get("tiny", "1").batcher
    large = np.zeros((3, MESSAGE_BYTES), np.uint8)
    batcher.sample(large, {"logits": np.zeros((3, 3), np.float32)})

    assert [one.rows for one in rows_due(stream)] == [MESSAGE_ROWS, MESSAGE_ROWS, 1, 1, 1, 1]


def test_report_is_added_to_the_live_parity_of_its_version(sampled, tiny):
    stream = Streams(sampled).sample(parity_pb2.SampleTrafficRequest())
    shown(sampled, 1, tiny.images(4), tiny)
    rows_due(stream)
    assert not get_parity(sampled, parity_pb2.GetParityRequest()).versions[0].HasField("live")

    report(sampled, 3)

    one, other = get_parity(sampled, parity_pb2.GetParityRequest()).versions
    assert (one.live.total.rows, one.live.sampled, one.live.dropped) == (3, 4, 0)
    assert one.live.budget == sampled.get("tiny", "1").self_check.report.budget
    assert one.live.verdict == parity_pb2.LIVE_VERDICT_PASSED
    assert not other.HasField("live")


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"model": "none"}, ModelNotFoundError, "'none' is not found"),
        ({"version": "9"}, ModelNotFoundError, "version 9 is not found"),
        ({"version": "3"}, ModelNotFoundError, "version 3 is not at ready state"),
        ({"version": ""}, InvalidRequestError, "expected the number that came with the rows"),
        ({"version": "champion"}, InvalidRequestError, "expected the number that came with"),
        ({"version": "²"}, InvalidRequestError, "expected the number that came with the rows"),
        ({"version": "-1"}, InvalidRequestError, "expected the number that came with the rows"),
        ({"parent_sha256": "cd"}, PreconditionError, "'tiny' version 1 comes from 'ab'"),
        ({"parent_sha256": ""}, PreconditionError, "'tiny' version 1 comes from 'ab'"),
        ({"figures": None}, InvalidRequestError, "the report has no rows"),
        ({}, PreconditionError, "of which 0 were handed to shadows"),
    ],
)
def test_report_that_does_not_fit_is_refused(sampled, fields, error, text):
    with pytest.raises(error) as caught:
        report(sampled, **fields)

    assert text in str(caught.value)
    assert sampled.get("tiny", "1").live.message() is None


def test_report_to_a_server_that_samples_nothing_is_refused(several):
    with pytest.raises(PreconditionError, match="start it with --sample-rate above 0"):
        report(several)


def test_version_that_was_unloaded_has_lost_its_live_parity(sampled, tiny):
    stream = Streams(sampled).sample(parity_pb2.SampleTrafficRequest())
    shown(sampled, 1, tiny.images(4), tiny)
    rows_due(stream)
    report(sampled)

    sampled.unload("tiny")
    sampled.reconcile()

    live = sampled.get("tiny", "1").live
    assert (live.message(), live.counts().sampled) == (None, 0)
    with pytest.raises(PreconditionError):
        report(sampled)


def parities(stream):
    return [parity_pb2.GetParityResponse.FromString(content) for content in stream.due()]


def test_watcher_of_parity_is_told_what_is_and_then_what_changes(sampled, tiny):
    watch = Streams(sampled).watch(parity_pb2.GetParityRequest())
    rows = Streams(sampled).sample(parity_pb2.SampleTrafficRequest())
    (first,) = parities(watch)
    assert first == get_parity(sampled, parity_pb2.GetParityRequest())
    assert parities(watch) == []

    shown(sampled, 1, tiny.images(4), tiny)
    rows_due(rows)
    assert parities(watch) == []
    report(sampled)
    (reported,) = parities(watch)
    assert reported.versions[0].live.total.rows == 1
    assert reported.versions[0].live.sampled == 4
    shown(sampled, 1, tiny.images(4), tiny)
    rows_due(rows)
    assert parities(watch) == []
    sampled.unload("tiny")
    (empty,) = parities(watch)
    assert not empty.versions
    assert parities(watch) == []
    watch.close()


def test_watch_of_a_model_that_leaves_ends_and_of_one_that_is_not_there_is_refused(sampled):
    streams = Streams(sampled)
    with pytest.raises(ModelNotFoundError):
        streams.watch(parity_pb2.GetParityRequest(model="none"))
    watch = streams.watch(parity_pb2.GetParityRequest(model="tiny", version="2"))
    assert len(parities(watch)) == 1

    sampled.unload("tiny")

    with pytest.raises(ServiceError):
        parities(watch)


def test_only_so_many_watch_at_once(sampled):
    streams = Streams(sampled)
    watches = [streams.watch(parity_pb2.GetParityRequest()) for _ in range(MAX_WATCHERS)]
    with pytest.raises(LimitError):
        streams.watch(parity_pb2.GetParityRequest())

    watches[0].close()

    streams.watch(parity_pb2.GetParityRequest())


def test_rows_of_a_model_that_is_not_ready_may_be_waited_for(sampled):
    streams = Streams(sampled)
    sampled.unload("tiny")

    assert rows_due(streams.sample(parity_pb2.SampleTrafficRequest(model="tiny"))) == []
    with pytest.raises(ModelNotFoundError):
        streams.sample(parity_pb2.SampleTrafficRequest(model="none"))
    assert len(sampled.sampling._rings) == 1


def test_reports_while_versions_are_loaded_and_unloaded_end_in_a_sentence(sampled, tiny):
    stream = Streams(sampled).sample(parity_pb2.SampleTrafficRequest())
    over = threading.Event()
    refused: list[Exception] = []

    def reports():
        while not over.is_set():
            try:
                report(sampled)
            except ServiceError as error:
                refused.append(error)

    thread = threading.Thread(target=reports)
    thread.start()
    for _ in range(5):
        shown(sampled, 1, tiny.images(4), tiny)
        rows_due(stream)
        sampled.unload("tiny")
        sampled.reconcile()
    over.set()
    thread.join()

    assert {type(error) for error in refused} <= {ModelNotFoundError, PreconditionError}
