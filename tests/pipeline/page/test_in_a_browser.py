"""Pages as people see them: in Chromium, on a desk and on a phone, in light and in dark."""

import pytest

from pipeline import page
from tests.browser import chromium

pytestmark = pytest.mark.slow
LOOKED_AT = """() => {
  const wide = document.documentElement;
  const outside = [...document.querySelectorAll('body *')].filter(one => {
    const box = one.getBoundingClientRect();
    return box.width && box.right > wide.clientWidth + 1 && !one.closest('.scroll, pre, svg');
  });
  return {
    overflows: wide.scrollWidth - wide.clientWidth,
    outside: outside.map(one => one.outerHTML.slice(0, 200)),
    blank: [...document.images].filter(one => !one.naturalWidth || !one.clientWidth)
      .map(one => one.alt),
    images: document.images.length,
    figures: [...document.querySelectorAll('svg')].filter(one => one.clientHeight > 40).length,
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
  };
}"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory, request):
    """Give one file for each kind of page."""
    from tests.pipeline.page import conftest as make

    folder = tmp_path_factory.mktemp("pages")
    hostile = make.classifier(labels=[make.HOSTILE, "W" * 300, "</style>", "d"])
    garments, line = make.classifier(), make.numbers()
    many = make.classifier(100, side=96, channels=3)
    refused = page.render(garments.manifest, garments.found, why=["accuracy is low"])
    models = tmp_path_factory.mktemp("models")
    (models / "tiny.onnx").write_bytes(request.getfixturevalue("tiny").model())
    pair = [one.write(models) for one in (garments, make.classifier(version=4, seed=5))]
    written = {
        "classifier": page.render(garments.manifest, garments.found),
        "numbers": page.render(line.manifest, line.found),
        "hostile": page.render(hostile.manifest, hostile.found),
        "many": page.render(many.manifest, many.found),
        "refused": refused,
        "compared": page.of_two(*pair)[0],
    }
    for name, text in written.items():
        (folder / f"{name}.html").write_text(text)
    return folder


@pytest.fixture
def look(browser, pages):
    """Return a function that opens a page and says what is to be seen, and what it asked for."""

    def at(name, width, scheme):
        opened = browser.new_page(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=True
        )
        asked, said = [], []
        opened.on("console", lambda one: said.append(one.text))
        opened.on("pageerror", lambda one: said.append(str(one)))
        opened.on("dialog", lambda one: said.append(one.message))

        def note(route):
            asked.append(route.request.url)
            route.continue_()

        opened.route("**/*", note)
        opened.goto((pages / f"{name}.html").as_uri(), wait_until="load")
        seen = opened.evaluate(LOOKED_AT)
        opened.close()
        return seen | {"asked": [one for one in asked if not one.startswith("data:")], "said": said}

    return at


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "name", ["classifier", "numbers", "hostile", "many", "refused", "compared"]
)
def test_a_page_fits_shows_everything_and_asks_for_nothing(look, pages, name, width, scheme):
    seen = look(name, width, scheme)

    assert seen["overflows"] <= 0
    assert seen["outside"] == []
    assert seen["blank"] == []
    assert seen["said"] == []
    assert seen["asked"] == [(pages / f"{name}.html").as_uri()]
    assert (seen["images"] > 10) == (name in {"classifier", "hostile", "many", "refused"})
    assert seen["figures"] >= 2


def test_dark_is_light_on_dark(look):
    light, dark = (look("classifier", 1280, scheme) for scheme in ("light", "dark"))

    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(18, 22, 27)")
    assert light["ink"] != dark["ink"]


def test_on_paper_no_page_is_wider_than_the_paper(browser, pages):
    opened = browser.new_page(viewport={"width": 690, "height": 1000}, color_scheme="dark")
    opened.goto((pages / "classifier.html").as_uri())
    opened.emulate_media(media="print")

    seen = opened.evaluate(LOOKED_AT)

    assert seen["paper"] == "rgb(255, 255, 255)"
    assert seen["overflows"] <= 0
    assert opened.pdf(format="A4").startswith(b"%PDF")
    opened.close()
