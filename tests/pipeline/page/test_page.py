import re
from html.parser import HTMLParser

import numpy as np
import pytest

from pipeline import page
from pipeline.errors import CheckError
from pipeline.page.evidence import Evidence
from service.errors import BundleError

MAX_BYTES = 3_000_000
VOID = {"meta", "link", "img", "br", "input", "hr", "path", "use", "rect", "circle"}


class Checked(HTMLParser):
    """What a browser forgives and we do not."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.levels: list[int] = []
        self.wrong: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)
        self.wrong += self.open
        self.wrong += [f"id {one} twice" for one in {*self.ids} if self.ids.count(one) > 1]
        steps = zip([0, *self.levels], self.levels, strict=False)
        self.wrong += [f"h{now} below h{before}" for before, now in steps if now > before + 1]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, closed=True)

    def handle_starttag(self, tag, attrs, closed=False):
        found = dict(attrs)
        self.tags.append(tag)
        if len(found) != len(attrs):
            self.wrong.append(f"an attribute twice in {tag}")
        if "id" in found:
            self.ids.append(found["id"])
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if tag == "img" and not found.get("alt"):
            self.wrong.append("img without alt")
        self.fetched += [
            value
            for name, value in attrs
            if name in {"src", "href", "srcset", "xlink:href", "action", "data"}
            and not value.startswith(("data:", "#"))
        ]
        if not closed and tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> without its beginning")


@pytest.fixture(params=["garments", "line", "hostile"])
def made(request):
    return request.getfixturevalue(request.param)


def test_the_page_is_well_formed_fetches_nothing_and_runs_nothing(made):
    checked = Checked(page.render(made.manifest, made.found))

    assert checked.wrong == []
    assert checked.fetched == []
    assert not {"script", "iframe", "object", "embed", "form"} & {*checked.tags}
    assert checked.levels.count(1) == 1


def test_what_means_harm_is_shown_as_it_was_written(hostile):
    text = page.render(hostile.manifest, hostile.found)

    label = hostile.manifest.labels[0]
    assert label not in text
    assert "<script" not in text
    assert "onerror=alert(1)>" not in text
    assert "&lt;script&gt;alert(&#39;label&#39;)&lt;/script&gt;" in text
    assert text.count("<style>") == 1
    assert "{{7*7}}" in text
    assert "\x1b" not in text


def test_the_page_of_many_large_images_and_classes_stays_small(make_classifier):
    made = make_classifier(1000, side=300, channels=3)

    assert len(page.render(made.manifest, made.found).encode()) < MAX_BYTES


def test_the_page_is_the_same_each_time(garments):
    before = garments.manifest.SerializeToString(deterministic=True)

    first, second = (page.render(garments.manifest, garments.found) for _ in range(2))

    assert first == second
    assert garments.manifest.SerializeToString(deterministic=True) == before


def test_a_refused_model_says_why_and_not_how_to_serve_it(garments, tmp_path):
    garments.manifest.ClearField("name")
    garments.manifest.ClearField("version")
    del garments.manifest.parity[:]
    garments.manifest.ClearField("served")

    text = page.write_refused(
        tmp_path, garments.manifest, garments.found, ["accuracy is <low>"]
    ).read_text()

    assert "Nothing was published" in text
    assert "accuracy is &lt;low&gt;" in text
    assert 'id="serving"' not in text
    assert 'id="parity"' not in text
    assert Checked(text).wrong == []


def test_a_refused_model_has_no_bundle_that_the_page_is_made_of(garments, tmp_path):
    text = page.write_refused(tmp_path, garments.manifest, garments.found, ["why"]).read_text()

    assert "from the run's own records" in text
    assert "bundle's own" not in text


def test_a_seed_of_0_is_a_seed(garments):
    garments.manifest.training.seed = garments.manifest.dataset.split_seed = 0

    text = page.render(garments.manifest, garments.found)

    assert "<dt>seed</dt><dd>0</dd>" in text
    assert "<dt>split seed</dt><dd>0</dd>" in text


def test_the_page_says_which_rows_are_meant_and_what_the_curves_are_means_of(garments):
    text = page.render(garments.manifest, garments.found)

    assert "numbered as they were before these two were split" in text
    assert (
        "Training accuracy and loss are means over an epoch, while the weights still change" in text
    )


def test_a_published_bundle_is_shown_once_its_files_are_verified(garments, models):
    path = garments.write(models)

    assert "garments" in page.of_bundle(path)
    (path / "report.npz").write_bytes(b"changed")
    with pytest.raises(BundleError, match=r"report.npz has 7 bytes"):
        page.of_bundle(path)


def test_figures_that_contradict_each_other_are_refused_in_a_sentence(garments, models):
    garments.found.flip_row[:] = 10
    object.__setattr__(garments.found, "variants", np.array(["a"]))
    object.__setattr__(garments.found, "deltas", np.zeros((1, 2), np.int64))
    garments.manifest.parity[0].variant = "a"

    with pytest.raises(CheckError, match="contradict each other"):
        page.of_bundle(garments.write(models))


def test_a_bundle_that_was_published_without_evidence_is_shown(make_bundle):
    assert "tiny" in page.of_bundle(make_bundle())


def test_a_bundle_of_numbers_without_evidence_is_shown(make_generic_bundle):
    assert "line" in page.of_bundle(make_generic_bundle())


def test_an_empty_manifest_makes_a_page(garments):
    garments.manifest.Clear()

    assert Checked(page.render(garments.manifest, Evidence.empty())).wrong == []
