"""The page in a real browser: Debian's Chromium, on servers of the tiny model."""

import io
import json
import re
import signal
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser import chromium

WIDTHS = (1280, 390)
pytestmark = pytest.mark.slow
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Return a function that opens a page; what it asks for, and what goes wrong, is kept."""
    contexts = []

    def visit(url, *, width=1280, **options) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.asked, page.failed = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.failed.append(str(error)))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()


def answered(page):
    """Wait until everybody has answered."""
    expect(page.locator("#answered")).to_be_visible()
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")


def strangers(page):
    """Return what was asked of anybody but this host."""
    schemes = {"data", "blob"}
    urls = [urlsplit(one) for one in page.asked]
    return [one for one in urls if one.scheme not in schemes and one.hostname != "127.0.0.1"]


def png(pixels):
    written = io.BytesIO()
    Image.fromarray(np.array(pixels, np.uint8)).save(written, "PNG")
    return {"name": "picture.png", "mimeType": "image/png", "buffer": written.getvalue()}


def test_a_test_image_is_answered_with_bars_time_and_every_variant(served, open_page, visit):
    address, models = served
    page = visit(open_page(address, models).url)

    page.locator("#images button").nth(2).click()
    answered(page)

    expect(page.locator("#bars li")).to_have_count(3)
    expect(page.locator("#top")).to_contain_text("%")
    expect(page.locator("#truth")).to_have_text("✓ right")
    expect(page.locator("#by")).to_have_text("tiny, version 1")
    expect(page.locator("#latency")).to_contain_text("queue")
    expect(page.locator("#latency")).to_contain_text("compute")
    assert page.locator("#seen").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [
        2, 2,
    ]  # fmt: skip
    variants = page.locator("#variants [data-variant]")
    names = variants.evaluate_all("rows => rows.map(row => row.dataset.variant)")
    assert names == ["saved-model", "served", "onnx-float32", "onnx-int8", "tflite-int8"]
    expect(variants.nth(3)).to_contain_text("0.25")
    expect(variants.nth(4)).to_contain_text("not published: it was over its budget")
    expect(page.locator("#server")).to_have_text(f"serving on {address}")
    expect(page.locator("#reports")).to_contain_text("self-check")
    expect(page.locator("#figures")).to_contain_text("answered in all")
    assert not strangers(page)
    assert not page.failed


def test_a_drawing_is_answered_after_each_stroke_and_can_be_undone(served, open_page, visit):
    page = visit(open_page(*served).url)
    answered(page)
    page.click("#tab-draw")
    before = page.locator("#seen").get_attribute("src")

    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 60, box["y"] + 250, steps=5)
    page.mouse.up()

    expect(page.locator("#seen")).not_to_have_attribute("src", before)
    answered(page)
    expect(page.locator("#truth")).to_be_empty()
    page.click("#undo")
    expect(page.locator("#undo")).to_be_disabled()
    assert not page.failed


def test_a_good_upload_is_answered_and_a_bad_one_is_one_sentence(
    served, open_page, visit, tmp_path
):
    page = visit(open_page(*served).url)
    answered(page)
    huge = tmp_path / "huge.png"
    with huge.open("wb") as file:
        file.truncate(200 << 20)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(bomb)
    refused, file = page.locator("#refused"), page.locator("#file")

    for bad, said in (
        ({"name": "a.png", "mimeType": "image/png", "buffer": b"hello"}, "is not a PNG or JPEG"),
        (
            {**png(np.eye(99) * 255), "buffer": png(np.eye(99) * 255)["buffer"][:90]},
            "cannot be read as a picture: it is cut off",
        ),
        (huge, "has 200 MiB, expected at most 32"),
        (bomb, "pixels; make it smaller"),
    ):
        file.set_input_files(bad)
        expect(refused).to_contain_text(said)
    file.set_input_files(png([[250, 0], [250, 0]]))

    answered(page)
    expect(refused).to_be_hidden()
    expect(page.locator("#top")).to_contain_text("striped")
    expect(page.locator("#preview")).to_be_visible()
    assert not page.failed


def test_a_light_border_is_only_spoken_of_where_test_images_may_be_light_on_black(
    served, open_page, visit
):
    address, models = served
    known, unknown = (visit(open_page(address, one).url) for one in (models, None))
    expect(unknown.locator("#no-images")).to_be_visible()
    answered(known)  # its test images are not light on black

    for page in (known, unknown):
        page.locator("#file").set_input_files(png([[250, 250], [250, 250]]))
        expect(page.locator("#top")).to_contain_text("light")

    expect(unknown.locator("#hint")).to_contain_text("swap light and dark")
    expect(known.locator("#hint")).to_be_hidden()
    unknown.check("#invert")
    expect(unknown.locator("#top")).to_contain_text("dark")


@pytest.mark.parametrize("black", [True, False])
def test_what_to_draw_is_only_said_where_the_test_images_are_so(served, open_page, visit, black):
    page = visit(open_page(*served).url)
    answered(page)

    def told(route):
        found = route.fetch().json()
        assert found["light_on_black"] is False
        route.fulfill(json=found | {"light_on_black": black})

    page.route("**/api/images*", told)
    page.reload()
    answered(page)
    page.click("#tab-draw")

    if black:
        expect(page.locator("#ground")).to_have_text("Light on black, as the test images are.")
    else:
        expect(page.locator("#ground")).to_be_hidden()
    expect(page.locator("#draw")).to_contain_text("It is answered after each stroke.")


def test_on_one_image_only_floats_over_their_budget_and_unexplained_flips_are_red(
    served, open_page, visit
):
    page = visit(open_page(*served).url)
    page.locator("#images button").nth(2).click()
    answered(page)
    rows = page.locator("#variants")
    over = rows.locator("[data-variant=onnx-int8] .meter")

    expect(over).to_have_class("meter none")
    expect(over).to_contain_text("0.25budget ")
    expect(page.locator("#integers")).to_contain_text("one image is no verdict")
    expect(rows.locator(".over, .bad-text")).to_have_count(0)

    def told(route):
        first = route.fetch().text().splitlines()[0]
        answer = {"allowed": 0.5, "probabilities": [0, 1, 0], "ms": 1, "over": False}
        variants = [
            answer | {"variant": "float", "apart": 0.6, "same": True, "over": True},
            answer | {"variant": "explained", "apart": 0.4, "same": False, "unexplained": False},
            answer | {"variant": "unexplained", "apart": 0.4, "same": False, "unexplained": True},
        ]
        route.fulfill(body=first + "\n" + json.dumps({"variants": variants}))

    page.route("**/api/answer*", told)
    page.locator("#images button").nth(3).click()

    expect(rows.locator("[data-variant=float] .meter")).to_have_class("meter over")
    expect(rows.locator("[data-variant=explained] .bad-text")).to_have_count(0)
    expect(rows.locator("[data-variant=explained]")).to_contain_text("within twice the budget")
    expect(rows.locator("[data-variant=unexplained] .bad-text")).to_have_text(re.compile("%"))
    expect(page.locator("#integers")).to_be_hidden()


def test_a_crash_of_the_variants_is_said_beside_the_served_answer(served, open_page, visit):
    page = visit(open_page(*served).url)
    answered(page)

    page.locator("#file").set_input_files(png([[66, 66], [66, 66]]))

    expect(page.locator("#missing")).to_contain_text("no memory is left")
    expect(page.locator("#answered")).to_be_visible()


def test_without_the_models_folder_the_page_says_what_is_missing(served, open_page, visit):
    page = visit(open_page(served[0]).url)

    expect(page.locator("#no-images")).to_contain_text("--models FOLDER")
    page.locator("#file").set_input_files(png([[250, 0], [250, 0]]))

    expect(page.locator("#top")).to_contain_text("striped")
    expect(page.locator("#missing")).to_contain_text("--models FOLDER")


def test_a_server_that_goes_away_is_said_and_the_page_goes_on_when_it_is_back(
    make_bundle, variants_of, start_server, open_page, visit
):
    models = make_bundle(edit=variants_of).parents[1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ("--repository", str(models), "--address", address)
    server = start_server(*options)
    server.address()
    page = visit(open_page(address, models).url)
    answered(page)
    first = page.locator("#seen").get_attribute("src")

    server.popen.send_signal(signal.SIGKILL)
    server.wait()
    expect(page.locator("#server")).to_have_text(f"no server on {address}")
    expect(page.locator("#away")).to_contain_text(f"No server answers at {address}")
    page.locator("#images button").nth(5).click()
    expect(page.locator("#load")).to_have_class("card stale")
    expect(page.locator("#parity")).to_have_class("card stale")
    expect(page.locator("#refused")).to_contain_text("asked again when the server is back")
    expect(page.locator("#answered")).to_be_hidden()
    start_server(*options).address()

    expect(page.locator("#server")).to_have_text(f"serving on {address}")
    expect(page.locator("#away")).to_be_hidden()
    expect(page.locator("#load")).to_have_class("card")
    answered(page)
    expect(page.locator("#refused")).to_be_hidden()
    expect(page.locator("#seen")).not_to_have_attribute("src", first)
    assert not page.failed


def test_a_version_that_is_published_appears_and_can_be_chosen(
    make_bundle, variants_of, open_repository, listen, open_page, visit
):
    from service import aliases
    from service.rpc import Rpc

    path = make_bundle(edit=variants_of)
    repository = open_repository(path.parents[1])
    page = visit(open_page(listen(Rpc(repository)), path.parents[1]).url)
    answered(page)

    make_bundle(version=2, striped=500, edit=variants_of)
    aliases.write(path.parent, {"champion": 1})
    repository.reconcile()

    expect(page.locator("#version option")).to_have_count(3)
    page.select_option("#version", "2")
    expect(page.locator("#by")).to_have_text("tiny, version 2")
    expect(page.locator("#top")).to_contain_text("striped")


def test_the_load_of_one_version_is_not_drawn_as_another_ones(
    make_bundle, open_repository, listen, open_page, visit
):
    from service.rpc import Rpc

    path = make_bundle(version=1)
    make_bundle(version=2, striped=2)
    repository = open_repository(path.parents[1])
    page = visit(open_page(listen(Rpc(repository)), path.parents[1]).url)
    expect(page.locator("#chart .line")).to_have_attribute("d", re.compile("(L.*){3}"))

    page.select_option("#version", "2")

    drawn = page.evaluate("document.querySelector('#chart .line')?.getAttribute('d') ?? ''")
    assert drawn.count("L") <= 1


@pytest.mark.parametrize("width", WIDTHS)
def test_bars_stay_beside_a_class_of_a_long_name(
    make_bundle, open_repository, listen, open_page, visit, width
):
    from service.rpc import Rpc

    def edit(manifest):
        manifest.labels[0] = "dark " * 28

    models = make_bundle(edit=edit).parents[1]
    page = visit(open_page(listen(Rpc(open_repository(models))), models).url, width=width)
    answered(page)

    name, track = (page.locator(f"#bars .{one}").first.bounding_box() for one in ("name", "track"))
    whole = page.locator("#bars").bounding_box()["width"]
    assert name["width"] <= 0.41 * whole
    assert track["width"] >= 0.25 * whole
    assert page.locator("#bars .name").first.get_attribute("title") == "dark " * 28


def test_a_model_that_takes_no_pictures_is_named_once_and_as_it_is_called(
    make_bundle, make_generic_bundle, open_repository, listen, open_page, visit
):
    from service.rpc import Rpc

    models = make_bundle().parents[1]
    assert make_generic_bundle().parents[1] == models
    page = visit(open_page(listen(Rpc(open_repository(models))), models).url)
    page.select_option("#model", "tiny")
    answered(page)

    page.select_option("#model", "line")

    expect(page.locator("#no-images")).to_contain_text("The model line takes FP32")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#refused")).to_be_hidden()
    page.click("#tab-upload")
    page.locator("#file").set_input_files(png([[250, 0], [250, 0]]))
    expect(page.locator("#refused")).to_contain_text("the model line takes FP32")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(served, open_page, visit, width, scheme):
    page = visit(open_page(*served).url, width=width, color_scheme=scheme)

    for tab in ("#tab-pick", "#tab-draw", "#tab-upload"):
        page.click(tab)
        answered(page)
        expect(page.locator("#reports td").first).to_be_visible()
        found = page.evaluate(
            "[...document.querySelectorAll('body *')].filter(one => {"
            "  const box = one.getBoundingClientRect();"
            "  return box.width > 1 && (box.right > innerWidth + 1 || box.left < -1);"
            "}).map(one => one.outerHTML.slice(0, 80))"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert found == []
    assert not strangers(page)
