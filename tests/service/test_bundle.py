import hashlib
import io
import json
import random
import struct
import zipfile

import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import bundle_pb2
from service import bundle
from service.errors import BundleError


def refusal(path):
    with pytest.raises(BundleError) as caught:
        bundle.read(path)
    return str(caught.value)


def rewrite(path, file, content):
    """Replace a file and sign it again, so that only its content can be wrong."""
    (path / file).write_bytes(content)
    manifest = json.loads((path / bundle.MANIFEST).read_text())
    entry = next(entry for entry in manifest["files"] if entry["path"] == file)
    entry.update(sha256=hashlib.sha256(content).hexdigest(), sizeBytes=len(content))
    (path / bundle.MANIFEST).write_text(json.dumps(manifest))


def flipped(content, rng):
    mutated = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        mutated[rng.randrange(len(mutated))] ^= 1 << rng.randrange(8)
    return bytes(mutated[: rng.randrange(len(mutated))] if rng.random() < 0.1 else mutated)


def golden_arrays(path):
    with np.load(path / bundle.GOLDEN) as arrays:
        return dict(arrays)


def npz(arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def test_whole_bundle_is_read_with_its_model_and_golden_set(make_bundle, tiny):
    path = make_bundle()

    content = bundle.read(path)

    assert (content.path, content.manifest.name, content.manifest.version) == (path, "tiny", 1)
    assert content.model == (path / "model.onnx").read_bytes()
    np.testing.assert_array_equal(content.golden.outputs, tiny.logits(content.golden.inputs))
    assert len(content.golden.labels) == len(content.golden.inputs)
    assert len(content.golden.hostile_outputs) == len(content.golden.hostile_inputs)


def test_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")

    assert bundle.sha256(b"abc").startswith("ba7816bf8f01cfea")
    assert bundle.file_sha256(tmp_path / "a") == bundle.sha256(b"abc")


def test_unlisted_file_does_no_harm(make_bundle):
    path = make_bundle()
    (path / "notes.txt").write_text("hello")

    assert bundle.read(path).manifest.name == "tiny"


def test_listed_file_that_is_not_served_is_verified_too(make_bundle):
    def add(manifest):
        manifest.files.add(path="sub/card.md", sha256=bundle.sha256(b"card"), size_bytes=4)

    path = make_bundle(edit=add)
    (path / "sub").mkdir()
    (path / "sub/card.md").write_bytes(b"card")
    assert bundle.read(path).manifest.name == "tiny"

    (path / "sub/card.md").write_bytes(b"lard")
    assert "tiny/1/sub/card.md has sha256" in refusal(path)


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_wrong_digest_is_refused(make_bundle, file):
    path = make_bundle()
    content = bytearray((path / file).read_bytes())
    before = bundle.sha256(bytes(content))[:12]
    content[40] ^= 1
    (path / file).write_bytes(content)

    assert refusal(path) == (
        f"tiny/1/{file} has sha256 {bundle.sha256(bytes(content))[:12]}…, expected {before}…; "
        "it was changed after it was published"
    )


@pytest.mark.parametrize("change", [-1, 1])
def test_wrong_size_is_refused(make_bundle, change):
    path = make_bundle()
    content = (path / "model.onnx").read_bytes()
    (path / "model.onnx").write_bytes((content + b"x")[: len(content) + change])

    assert refusal(path) == (
        f"tiny/1/model.onnx has {len(content) + change} bytes, expected {len(content)}; "
        "it was cut or changed after it was published"
    )


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_missing_file_is_refused(make_bundle, file):
    path = make_bundle()
    (path / file).unlink()

    assert refusal(path) == f"tiny/1/{file} is missing, or not a plain file; publish it again"


def test_file_that_is_a_link_or_a_folder_is_refused(make_bundle, tmp_path):
    path = make_bundle()
    (path / "model.onnx").rename(tmp_path / "model.onnx")
    (path / "model.onnx").symlink_to(tmp_path / "model.onnx")
    assert "tiny/1/model.onnx is missing, or not a plain file" in refusal(path)

    (path / "model.onnx").unlink()
    (path / "model.onnx").mkdir()
    assert "tiny/1/model.onnx is missing, or not a plain file" in refusal(path)


def test_link_in_the_middle_of_a_listed_path_is_refused(make_bundle, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_bytes(b"secret")

    def add(manifest):
        manifest.files.add(path="sub/secret", sha256=bundle.sha256(b"secret"), size_bytes=6)

    path = make_bundle(edit=add)
    (path / "sub").symlink_to(tmp_path / "outside")

    assert refusal(path) == "tiny/1/sub/secret is missing, or not a plain file; publish it again"


def test_repository_may_itself_be_reached_over_a_link(make_bundle, tmp_path):
    make_bundle()
    (tmp_path / "link").symlink_to(tmp_path / "models")

    assert bundle.read(tmp_path / "link/tiny/1").manifest.name == "tiny"


@pytest.mark.parametrize("listed", ["../2/model.onnx", "/etc/hostname", "a/../../b", "", "."])
def test_listed_path_that_leaves_the_bundle_is_refused(make_bundle, listed):
    path = make_bundle(edit=lambda manifest: manifest.files.add(path=listed))

    assert refusal(path) == f"tiny/1/manifest.json lists {listed!r}, which leaves the bundle"


def test_listed_path_that_no_file_system_takes_is_refused(make_bundle):
    path = make_bundle(edit=lambda manifest: manifest.files.add(path="a" * 300))

    assert refusal(path) == f"tiny/1/{'a' * 300} cannot be read: File name too long"


@pytest.mark.parametrize("listed", ["a\0b", "a\nb", "\u202eb", "a" * 1001], ids=ascii)
def test_listed_path_that_is_not_the_name_of_a_file_is_refused_in_one_short_line(
    make_bundle, listed
):
    path = make_bundle(edit=lambda manifest: manifest.files.add(path=listed))

    message = refusal(path)
    assert message.endswith(", which is not a file's name")
    assert message.isprintable()
    assert len(message) < 300


def test_listed_path_as_long_as_they_may_be_is_looked_for(make_bundle):
    path = make_bundle(edit=lambda manifest: manifest.files.add(path="a/" * 499 + "ab"))

    assert "is missing, or not a plain file" in refusal(path)


def test_digest_that_is_none_is_shown_without_its_control_characters(make_bundle):
    def edit(manifest):
        manifest.files[1].sha256 = "a\n\0" * 100

    assert "expected a\\n\\x00a\\n\\x00" in refusal(make_bundle(edit=edit))


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_manifest_that_does_not_list_what_is_needed_is_refused(make_bundle, file):
    def drop(manifest):
        manifest.files.remove(next(entry for entry in manifest.files if entry.path == file))

    assert refusal(make_bundle(edit=drop)) == (
        f"tiny/1/manifest.json does not list {file}; publish it again"
    )


@pytest.mark.parametrize("number", [0, 2])
def test_unknown_format_is_refused(make_bundle, number):
    path = make_bundle(edit=lambda manifest: setattr(manifest, "format", number))

    assert refusal(path) == f"tiny/1/manifest.json has format {number}, expected 1"


@pytest.mark.parametrize(("name", "version"), [("other", 1), ("tiny", 2)])
def test_renamed_bundle_is_refused(make_bundle, name, version):
    path = make_bundle()
    renamed = path.parents[1] / name / str(version)
    renamed.parent.mkdir(exist_ok=True)
    path.rename(renamed)

    assert refusal(renamed) == (
        f"{name}/{version}/manifest.json is of tiny version 1, expected {name} version {version}; "
        "a bundle may not be renamed"
    )


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a b", "a\n", "-a", "ä", "a" * 129])
def test_name_that_is_not_a_name_is_refused(name):
    with pytest.raises(BundleError) as caught:
        bundle.parse_manifest(json.dumps({"format": 1, "name": name}).encode(), "here")

    assert str(caught.value) == f"here names the model {name!r}, which is not a name"


@pytest.mark.parametrize("name", ["a", "7", "Fashion-MNIST_v1.2", "a" * 128])
def test_name_of_letters_digits_dots_and_dashes_is_taken(name):
    content = json.dumps({"format": 1, "name": name}).encode()

    assert bundle.parse_manifest(content, "here").name == name


def test_manifest_with_a_field_of_a_later_version_is_taken():
    content = b'{"format": 1, "name": "a", "colour": "red", "session": {"new": [1]}}'

    assert bundle.parse_manifest(content, "here").name == "a"


def test_missing_manifest_is_refused(tmp_path):
    (tmp_path / "tiny/1").mkdir(parents=True)

    assert refusal(tmp_path / "tiny/1") == (
        "tiny/1/manifest.json is missing, or not a plain file; publish it again"
    )


def test_manifest_at_the_size_limit_is_taken_and_one_byte_more_is_refused(make_bundle):
    path = make_bundle()
    content = (path / bundle.MANIFEST).read_bytes()
    (path / bundle.MANIFEST).write_bytes(content.ljust(bundle.MAX_MANIFEST_BYTES))
    assert bundle.read(path).manifest.name == "tiny"

    (path / bundle.MANIFEST).write_bytes(content.ljust(bundle.MAX_MANIFEST_BYTES + 1))
    assert refusal(path) == ("tiny/1/manifest.json is over 8388608 bytes; it is not a manifest")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"5",
        b"[1]",
        b"\xff",
        b"\xef\xbb\xbf{}",
        b'{"format": 1, "format": 1}',
        b'{"name": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"kind": "\\ud800"}',
        b'{"version": ' + b"9" * 5000 + b"}",
        b'{"version": -1}',
        b'{"version": 1e400}',
        b'{"files": [null]}',
        b'{"parity": {"a": 1}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_content_that_is_not_a_manifest_is_refused_in_one_line(content):
    with pytest.raises(BundleError, match=r"\Ahere is not a bundle manifest: [^\n]+\Z"):
        bundle.parse_manifest(content, "here")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"5", "it has other fields than a manifest"),
        (b'{"\\ud800": 1}', "it has other fields than a manifest"),
        (
            b'{"labels": "\\ud800\\n"}',
            "Failed to parse labels field: repeated field labels must be in [] which is \\ud800",
        ),
    ],
)
def test_reason_names_nothing_inside_and_can_be_sent(content, reason):
    with pytest.raises(BundleError) as caught:
        bundle.parse_manifest(content, "here")

    assert str(caught.value) == f"here is not a bundle manifest: {reason}"
    assert str(caught.value).encode().decode().isprintable()


def test_reason_is_short_however_long_what_is_wrong_may_be():
    with pytest.raises(BundleError) as caught:
        bundle.parse_manifest(json.dumps({"labels": "x" * 1_000_000}).encode(), "here")
    assert len(str(caught.value)) < 300

    with pytest.raises(BundleError) as caught:
        bundle.parse_manifest(json.dumps({"format": 1, "name": "/" * 1000}).encode(), "here")
    assert str(caught.value) == f"here names the model '{'/' * 200}…', which is not a name"


VALID = json_format.MessageToJson(
    bundle_pb2.BundleManifest(
        format=1,
        name="tiny",
        version=1,
        kind=bundle_pb2.KIND_CLASSIFIER,
        input=bundle_pb2.TensorSpec(name="image", datatype="UINT8", shape=[-1, 2, 2, 1]),
        labels=["dark", "light"],
        files=[bundle_pb2.File(path="model.onnx", sha256="ab", size_bytes=5)],
        session=bundle_pb2.SessionOptions(graph_optimization="all", config={"a": "b"}),
        parity=[
            bundle_pb2.ParityReport(
                variant="onnx-float32",
                budget=bundle_pb2.Budget(precision="float32", max_logit=1e-3),
                flips_explained=3,
                passed=True,
            )
        ],
    )
)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["format", "name", "files", "path", "parity", "session", "budget"])
            | st.text(max_size=3),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@given(st.binary() | st.text().map(str.encode) | JSON.map(lambda value: json.dumps(value).encode()))
def test_arbitrary_bytes_are_a_manifest_or_refused(content):
    try:
        manifest = bundle.parse_manifest(content, "here")
    except BundleError as error:
        assert str(error).startswith("here ")
    else:
        assert manifest.format == bundle.FORMAT


@given(st.integers(0, 2**32))
def test_mutated_manifest_is_a_manifest_or_refused(seed):
    rng = random.Random(seed)
    manifest = VALID.encode()
    mutated = flipped(manifest, rng)

    try:
        parsed = bundle.parse_manifest(mutated, "here")
    except BundleError as error:
        assert "\n" not in str(error)
    else:
        assert parsed.format == bundle.FORMAT


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_manifest_mutated_on_disk_is_read_or_refused(make_bundle, tmp_path_factory, seed):
    path = make_bundle(tmp_path_factory.mktemp("mutated"))
    original = (path / bundle.MANIFEST).read_bytes()
    (path / bundle.MANIFEST).write_bytes(flipped(original, random.Random(seed)))

    try:
        bundle.read(path)
    except BundleError as error:
        assert str(path.parents[1]) not in str(error)


@pytest.mark.parametrize("file", ["model.onnx", "golden.npz"])
def test_any_flipped_byte_of_a_file_is_refused(make_bundle, file):
    path = make_bundle()
    content = (path / file).read_bytes()
    rng = random.Random(0)

    for _ in range(100):
        mutated = bytearray(content)
        mutated[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (path / file).write_bytes(mutated)
        assert "it was changed after it was published" in refusal(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_golden_set_of_flipped_bytes_that_was_signed_is_read_or_refused(make_bundle, compressed):
    path = make_bundle()
    content = (path / "golden.npz").read_bytes()
    if compressed:
        content = npz(golden_arrays(path))
    rng = random.Random(0)
    refused = 0

    for _ in range(150):
        rewrite(path, "golden.npz", flipped(content, rng))
        try:
            bundle.read(path)
        except BundleError as error:
            assert str(error).startswith("tiny/1/golden.npz is not a golden set: ")
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    "content", [b"", b"PK\x05\x06" + bytes(18), b"\x93NUMPY", b"\x80\x04N."], ids=repr
)
def test_other_content_than_a_golden_set_is_refused(make_bundle, content):
    path = make_bundle()
    rewrite(path, "golden.npz", content)

    assert refusal(path).startswith("tiny/1/golden.npz is not a golden set: ")


def test_golden_set_that_lacks_an_array_is_refused(make_bundle):
    path = make_bundle()
    arrays = golden_arrays(path)
    del arrays["hostile_logits"]
    rewrite(path, "golden.npz", npz(arrays))

    assert "hostile_logits" in refusal(path)


def test_lone_array_is_not_a_golden_set(make_bundle):
    path = make_bundle()
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    rewrite(path, "golden.npz", file.getvalue())

    assert refusal(path).startswith("tiny/1/golden.npz is not a golden set: ")


def test_pickled_golden_set_is_refused_and_not_unpickled(make_bundle):
    path = make_bundle()
    arrays = golden_arrays(path)
    arrays["labels"] = np.array([object], dtype=object)
    rewrite(path, "golden.npz", npz(arrays))

    assert "Object arrays cannot be loaded" in refusal(path)


def archive(member):
    """Return a golden set's archive with the same bytes for every array."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in ("images", "labels", "logits", "hostile_images", "hostile_logits"):
            made.writestr(f"{name}.npy", member)
    return file.getvalue()


def headed(header):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (",
        b"  {\n 'a':\n  b\n c}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (3.0,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1180591620717411303424,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}",
        b"{'descr': 'O', 'fortran_order': False, 'shape': (3,)}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': int}",
        b"-" * 9000 + b"1",
    ],
    ids=repr,
)
def test_array_that_cannot_be_read_is_refused_without_naming_anything_inside(make_bundle, header):
    path = make_bundle()
    rewrite(path, "golden.npz", archive(headed(header)))

    message = refusal(path)
    assert message.startswith("tiny/1/golden.npz is not a golden set: ")
    assert " at 0x" not in message
    assert message.isprintable()


def test_file_in_a_golden_set_that_is_no_array_is_refused(make_bundle):
    path = make_bundle()
    rewrite(path, "golden.npz", archive(b"pixels"))

    assert refusal(path) == "tiny/1/golden.npz is not a golden set: images is not an array"


def test_golden_set_that_would_fill_the_memory_is_refused_before_it_is_unpacked(make_bundle):
    path = make_bundle()
    size, huge = len(headed(b"")), bundle.MAX_GOLDEN_BYTES // 5 + 1
    content = archive(headed(b"")).replace(
        struct.pack("<II", size, size), struct.pack("<II", size, huge)
    )
    rewrite(path, "golden.npz", content)

    assert refusal(path) == (
        f"tiny/1/golden.npz is not a golden set: it has {huge * 5} bytes unpacked, "
        f"expected at most {bundle.MAX_GOLDEN_BYTES}"
    )
