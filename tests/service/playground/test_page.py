import io
import json
import urllib.request

import numpy as np
import pytest
from PIL import Image

from service import aliases
from service.playground import page, variants

OVER = page.MAX_UPLOAD_BYTES + 1


def png(pixels):
    written = io.BytesIO()
    Image.fromarray(np.array(pixels, np.uint8)).save(written, "PNG")
    return written.getvalue()


GOOD = png([[10, 20], [30, 40]])


@pytest.fixture
def shown(served, open_page):
    address, models = served
    return open_page(address, models)


def test_all_that_a_browser_loads_comes_with_a_policy_that_lets_it_load_nothing_else(shown):
    for path in page.FILES:
        reply = shown.get(path)

        assert reply.status == 200
        assert "http://" not in reply.text.replace("http://www.w3.org/", "")
        assert "https://" not in reply.text
        assert reply.headers["content-security-policy"].startswith("default-src 'none'")
        assert reply.headers["x-content-type-options"] == "nosniff"


def test_an_uploaded_picture_is_answered_by_everybody(shown, tiny):
    first, *others = shown.get("/api/answer?model=tiny", GOOD).lines

    served = first["served"]
    assert (served["model"], served["version"]) == ("tiny", "1")
    assert served["labels"] == list(tiny.labels)
    assert np.argmax(served["probabilities"]) == 0
    assert served["shape"] == [2, 2, 1]
    assert served["truth"] == ""
    assert served["latency"]["requests"] == 1
    rows = {one["variant"]: one for one in others[-1]["variants"]}
    assert list(rows) == ["saved-model", "served", "onnx-float32", "onnx-int8", "tflite-int8"]
    assert rows["served"]["apart"] == rows["onnx-float32"]["apart"] == 0
    assert rows["onnx-int8"]["apart"] == 0.25
    assert rows["onnx-int8"]["integers"] and not rows["onnx-int8"]["over"]
    assert rows["tflite-int8"]["refused"] == "it was over its budget"


def test_a_test_image_is_answered_with_its_class(shown, tiny):
    images = shown.get("/api/images?model=tiny").json
    first = images["images"][0]
    served = shown.get(f"/api/answer?model=tiny&row={first['row']}", b"").lines[0]["served"]

    assert (images["rows"], images["version"], len(images["images"])) == (12, "1", 12)
    assert images["light_on_black"] is False
    assert served["truth"] == first["label"]
    assert served["seen"] == first["source"]
    assert shown.get("/api/images?model=tiny&version=1&from=10").json["images"][1:]
    assert not shown.get("/api/images?model=tiny&from=100").json["images"]


def test_light_and_dark_are_swapped_when_it_is_asked_for(shown):
    seen = [
        shown.get(f"/api/answer?model=tiny&row=0&invert={invert}", b"").lines[0]["served"]["seen"]
        for invert in (0, 1)
    ]
    light, swapped = (
        shown.get(f"/api/answer?model=tiny&invert={invert}", png([[255, 255]] * 2)).lines[0]
        for invert in (0, 1)
    )

    assert seen[0] != seen[1]
    assert light["served"]["light_border"] and not swapped["served"]["light_border"]


@pytest.mark.parametrize(
    ("query", "content", "said"),
    [
        ("model=tiny", b"hello", "the file is not a PNG or JPEG picture"),
        (
            "model=tiny",
            png(np.eye(99) * 255)[:90],
            "the file cannot be read as a picture: it is cut off",
        ),
        ("model=tiny", b"", "the file is not a PNG or JPEG picture"),
        ("model=tiny&row=12", b"", "there is no test image 12"),
        ("model=tiny&row=x", b"", "row is 'x', expected a whole number of at most 9 digits"),
        (
            f"model=tiny&row={'1' * 5000}",
            b"",
            "row is '111111111...', expected a whole number of at most 9 digits",
        ),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(shown, query, content, said):
    reply = shown.get(f"/api/answer?{query}", content)

    assert reply.status == 400
    assert reply.json == {"error": said, "away": False}


def test_what_the_server_refuses_is_its_sentence(shown):
    reply = shown.get("/api/answer?model=nobody", GOOD)

    assert reply.status == 502
    assert not reply.json["away"]
    assert "'nobody'" in reply.json["error"]


def test_an_upload_that_is_too_large_is_refused_whether_or_not_its_size_is_told(shown):
    told = shown.get("/api/answer?model=tiny", bytes(OVER))
    request = urllib.request.Request(  # in chunks, because urllib cannot know how many come
        f"{shown.url}/api/answer?model=tiny",
        data=(bytes(1 << 20) for _ in range(33)),
        headers={"Transfer-Encoding": "chunked"},
        method="POST",
    )
    with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request):
        pass
    with refused.value as answer:
        untold = json.loads(answer.read())

    assert told.status == refused.value.code == 413
    assert told.json == untold
    assert told.json["error"].startswith("the file is over 32 MiB")


def test_without_the_bundle_only_the_server_answers_and_the_page_says_why(served, open_page):
    shown = open_page(served[0])

    first, last = shown.get("/api/answer?model=tiny", GOOD).lines

    assert "served" in first
    assert last["missing"].startswith("start the playground with --models FOLDER")
    assert shown.get("/api/images?model=tiny").json["error"] == last["missing"]


def test_without_the_variants_runtimes_only_the_server_answers(shown, monkeypatch):
    monkeypatch.setattr(variants, "NEEDED", ("no_such_package",))

    _, last = shown.get("/api/answer?model=tiny", GOOD).lines

    assert "install train-export[pipeline]" in last["missing"]


def test_a_crash_of_the_variants_is_said_below_the_answer(shown):
    first, *_, last = shown.get("/api/answer?model=tiny", png([[66, 66], [66, 66]])).lines

    assert "served" in first
    assert "ended with status 1: no memory is left" in last["missing"]
    assert len(shown.get("/api/answer?model=tiny", GOOD).lines) > 2


def test_what_one_variant_cannot_answer_stands_in_its_row(shown):
    *_, last = shown.get("/api/answer?model=tiny", png([[77, 77], [77, 77]])).lines

    errors = {one["variant"]: one["error"] for one in last["variants"]}
    assert errors["onnx-int8"] == "it overflowed"
    assert not errors["onnx-float32"]


def test_a_server_that_is_away_is_one_sentence(open_page, tmp_path):
    reply = open_page("127.0.0.1:1", tmp_path).get("/api/answer?model=tiny", GOOD)

    assert reply.status == 503
    assert reply.json["away"]
    assert reply.json["error"].startswith("no server answers at 127.0.0.1:1")


def test_another_name_than_this_hosts_is_refused_unless_the_page_is_for_others(served, open_page):
    ours, theirs = open_page(served[0]), open_page(served[0], loopback=False)

    assert ours.get("/", Host="evil.example").status == 403
    assert ours.get("/", Host=f"localhost:{ours.port}").status == 200
    assert ours.get("/", Host="[::1]:7860").status == 200
    assert theirs.get("/", Host="models.example:7860").status == 200


def test_another_page_in_the_same_browser_may_not_ask(shown):
    refused = shown.get("/api/answer?model=tiny", GOOD, Sec_Fetch_Site="cross-site")

    assert refused.status == 403
    assert refused.json == {"error": "another page may not ask"}
    assert shown.get("/", Sec_Fetch_Site="cross-site").status == 200  # a link to us
    assert shown.get("/api/answer?model=tiny", GOOD, Sec_Fetch_Site="same-origin").status == 200


@pytest.mark.parametrize("loopback", [True, False])
@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://[", "http://127.0.0.1:1"]
)
def test_a_page_of_another_origin_may_not_ask_wherever_we_listen(
    served, open_page, loopback, origin
):
    shown = open_page(*served, loopback=loopback)

    refused = shown.get("/api/answer?model=tiny", GOOD, Origin=origin)

    assert (refused.status, refused.json) == (403, {"error": "another page may not ask"})
    assert shown.get("/api/answer?model=tiny", GOOD, Origin=shown.url).status == 200


@pytest.mark.parametrize("start", ["9" * 5000, "-1", "x"])
def test_where_test_images_begin_has_to_be_a_number(shown, start):
    reply = shown.get(f"/api/images?model=tiny&from={start}")

    assert reply.status == 400
    assert "expected a whole number of at most 9 digits" in reply.json["error"]


def test_labels_cannot_turn_what_stands_around_them(
    make_bundle, open_repository, listen, open_page
):
    from service.rpc import Rpc

    def edit(manifest):
        manifest.labels[0] = "\u202ekrad"

    models = make_bundle(edit=edit).parents[1]
    shown = open_page(listen(Rpc(open_repository(models))), models)

    images = shown.get("/api/images?model=tiny").json["images"]
    first = shown.get("/api/answer?model=tiny", GOOD).lines[0]["served"]

    assert first["labels"][0] == "�krad"
    assert "�krad" in {one["label"] for one in images}


def test_the_server_is_watched_as_a_stream_of_events(shown):
    with urllib.request.urlopen(f"{shown.url}/api/live", timeout=30) as events:
        line = events.readline().decode()
        kind = events.headers["content-type"]

    state = json.loads(line.removeprefix("data: "))
    assert kind.startswith("text/event-stream")
    assert state["up"] and state["models"][0]["name"] == "tiny"


def test_the_choice_of_the_server_is_known_among_several_versions(
    make_bundle, open_repository, listen, open_page
):
    from service.rpc import Rpc

    make_bundle(version=1)
    path = make_bundle(version=2, striped=2)
    aliases.write(path.parent, {"champion": 1})
    shown = open_page(listen(Rpc(open_repository(path.parents[1]))), path.parents[1])

    choice = shown.get("/api/images?model=tiny").json
    first = shown.get("/api/answer?model=tiny&row=3", b"").lines[0]["served"]
    second = shown.get("/api/answer?model=tiny&row=3&version=2", b"").lines[0]["served"]

    assert choice["version"] == first["version"] == "1"
    assert second["version"] == "2"
