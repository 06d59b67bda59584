"""Pages as people see them: in Chromium, on a desk and on a phone, in light and in dark."""

import io

import pytest
from PIL import Image

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
    names = ["a class of exactly forty characters here", "שלום " * 8, "日" * 20]
    long = make.classifier(16, labels=names + [f"class {one}" for one in range(13)])
    garments, line = make.classifier(), make.numbers()
    many = make.classifier(100, side=96, channels=3)
    refused = page.render(garments.manifest, garments.found, why=["accuracy is low"])
    models = tmp_path_factory.mktemp("models")
    (models / "tiny.onnx").write_bytes(request.getfixturevalue("tiny").model())
    second = make.classifier(version=4, seed=5)
    second.manifest.training.architecture = "residual-network-of-fifty-layers"
    pair = [one.write(models) for one in (garments, second)]
    written = {
        "classifier": page.render(garments.manifest, garments.found),
        "numbers": page.render(line.manifest, line.found),
        "hostile": page.render(hostile.manifest, hostile.found),
        "long": page.render(long.manifest, long.found),
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
    "name", ["classifier", "numbers", "hostile", "long", "many", "refused", "compared"]
)
def test_a_page_fits_shows_everything_and_asks_for_nothing(look, pages, name, width, scheme):
    seen = look(name, width, scheme)

    assert seen["overflows"] <= 0
    assert seen["outside"] == []
    assert seen["blank"] == []
    assert seen["said"] == []
    assert seen["asked"] == [(pages / f"{name}.html").as_uri()]
    assert (seen["images"] > 10) == (name not in {"numbers", "compared"})
    assert seen["figures"] >= 2


def test_dark_is_light_on_dark(look):
    light, dark = (look("classifier", 1280, scheme) for scheme in ("light", "dark"))

    assert (light["paper"], dark["paper"]) == ("rgb(255, 255, 255)", "rgb(18, 22, 27)")
    assert light["ink"] != dark["ink"]


@pytest.fixture
def opened(browser, pages):
    """Return a function that opens a page for more than one look."""
    seen = []

    def at(name, width, **options):
        one = browser.new_page(viewport={"width": width, "height": 900}, **options)
        seen.append(one)
        one.goto((pages / f"{name}.html").as_uri())
        return one

    yield at
    for one in seen:
        one.close()


def right_end(region):
    """Return the colour at the right end of an element and that of its ground, above its text."""
    picture = Image.open(io.BytesIO(region.screenshot())).convert("RGB")
    return [picture.getpixel((x, 5)) for x in (picture.width - 5, picture.width // 2)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("name", "place"),
    [("classifier", "#parity .scroll"), ("compared", "#parity .scroll"), ("long", "pre")],
)
def test_what_is_cut_has_a_shadow_where_it_goes_on(opened, name, place, scheme):
    seen = opened(name, 390, color_scheme=scheme)
    region = seen.locator(place).first
    assert region.evaluate("one => one.scrollWidth > one.clientWidth + 20")

    end, ground = right_end(region)
    assert end != ground
    region.evaluate("one => { one.scrollLeft = 1e6; }")
    end, ground = right_end(region)
    assert end == ground


def test_whatever_scrolls_can_be_reached_with_the_keyboard_and_has_a_name(opened):
    for name in ("classifier", "long", "compared", "numbers"):
        unreachable = opened(name, 390).evaluate(
            "[...document.querySelectorAll('body *')].filter(one =>"
            "  one.scrollWidth > one.clientWidth + 1"
            "  && ['auto', 'scroll'].includes(getComputedStyle(one).overflowX)"
            "  && !(one.tabIndex === 0 && one.role === 'region' && one.ariaLabel)"
            ").map(one => one.outerHTML.slice(0, 80))"
        )
        assert unreachable == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_long_class_name_makes_no_row_of_the_matrix_higher(opened, width):
    rows = opened("long", width).evaluate(
        "[...document.querySelectorAll('.matrix tbody tr')].map(one => one.clientHeight)"
    )

    assert len(rows) == 16
    assert max(rows) == min(rows)


def test_a_class_name_that_is_cut_is_whole_in_its_title(opened):
    name = opened("long", 390).locator(".matrix tbody .name").first

    assert name.get_attribute("title") == "a class of exactly forty characters here"
    assert name.evaluate("one => one.scrollHeight > one.clientHeight")


def test_no_word_is_broken_in_the_names_of_figures(opened):
    for name, place in (("compared", "#figures tbody th"), ("classifier", ".tiles dt")):
        broken = opened(name, 390).locator(place).evaluate_all(
            "names => names.filter(one => {"
            "  const apart = document.createElement('span');"
            "  apart.style.cssText = 'position: absolute; white-space: nowrap';"
            "  return one.innerText.split(/[ -]/).some(word => {"
            "    apart.textContent = word; one.append(apart);"
            "    const width = apart.offsetWidth; apart.remove();"
            "    return width > one.clientWidth - parseFloat(getComputedStyle(one).paddingRight);"
            "  });"
            "}).map(one => one.innerText)"
        )  # fmt: skip
        assert broken == []


@pytest.mark.parametrize(
    "name", ["classifier", "numbers", "hostile", "long", "many", "refused", "compared"]
)
def test_on_paper_nothing_is_cut_and_no_page_is_wider_than_the_paper(opened, name):
    page = opened(name, 690, color_scheme="dark")
    page.emulate_media(media="print")

    seen = page.evaluate(LOOKED_AT)
    cut = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(one => {"
        "  const box = one.getBoundingClientRect();"
        "  return !one.closest('svg, thead') && box.width && (box.right > 691"
        "    || (getComputedStyle(one).overflowX !== 'visible'"
        "      && one.scrollWidth > one.clientWidth + 1));"
        "}).map(one => one.outerHTML.slice(0, 80))"
    )

    assert seen["paper"] == "rgb(255, 255, 255)"
    assert seen["overflows"] <= 0
    assert cut == []
    assert page.pdf(format="A4").startswith(b"%PDF")
