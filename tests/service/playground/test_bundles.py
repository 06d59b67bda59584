import pytest

from protos import inference_pb2
from service import bundle
from service.playground.bundles import Bundles, Reader
from service.playground.errors import PlaygroundError


def about(sha256="", name="tiny"):
    return inference_pb2.ModelMetadataResponse(name=name, properties={"model.sha256": sha256})


def test_a_bundle_is_found_in_the_repository_or_is_the_one_that_was_given(make_bundle):
    path = make_bundle(version=3)

    assert Bundles(models=path.parents[1]).path("tiny", "3") == path
    assert Bundles(bundle=path).path("tiny", "3") == path


def test_what_is_missing_is_one_sentence(make_bundle, tmp_path):
    path = make_bundle()

    with pytest.raises(PlaygroundError, match="start the playground with --models FOLDER"):
        Bundles().path("tiny", "1")
    with pytest.raises(PlaygroundError, match="has no tiny 2; give the folder that the server"):
        Bundles(models=path.parents[1]).path("tiny", "2")
    with pytest.raises(PlaygroundError, match="is tiny 1; give --models"):
        Bundles(bundle=path).path("other", "1")
    with pytest.raises(PlaygroundError, match="is not a folder"):
        Bundles(models=tmp_path / "nothing")


@pytest.mark.parametrize(("model", "version"), [("..", "1"), ("tiny", "../1"), ("a/b", "1")])
def test_names_do_not_lead_out_of_the_folder(make_bundle, model, version):
    bundles = Bundles(models=make_bundle().parents[1])

    with pytest.raises(PlaygroundError, match="has no"):
        bundles.path(model, version)


def test_only_the_bundle_that_is_served_is_used(make_bundle):
    path = make_bundle()
    reader = Reader(Bundles(bundle=path))
    digest = bundle.file_sha256(path / "model.onnx")

    assert len(reader.read(about(digest), "1").golden.inputs) == 12
    with pytest.raises(PlaygroundError, match="is another tiny 1 than the server's"):
        reader.read(about("0" * 64), "1")


def test_a_damaged_bundle_is_not_used(make_bundle):
    path = make_bundle()
    (path / "golden.npz").write_bytes(b"")

    with pytest.raises(PlaygroundError, match=r"the bundle cannot be used: .*golden.npz has 0"):
        Reader(Bundles(bundle=path)).read(about(), "1")


def test_a_bundle_is_read_once_and_again_when_it_was_published_anew(make_bundle, monkeypatch):
    read = []
    original = bundle.read

    def noted(path):
        read.append(path)
        return original(path)

    monkeypatch.setattr(bundle, "read", noted)
    paths = [make_bundle(version=version) for version in range(1, 7)]
    reader = Reader(Bundles(models=paths[0].parents[1]))

    for version in (1, 1, 2, 3, 4, 5, 5, 1):  # 5 takes the place of 1
        reader.read(about(), str(version))

    assert [path.name for path in read] == ["1", "2", "3", "4", "5", "1"]
