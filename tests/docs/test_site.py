"""The site that `make docs` builds: strict, whole, and of this host alone."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from markdown_it import MarkdownIt
from typer.main import get_command

from docs.reference_text.commands import PROGRAMS
from pipeline import config
from protos import bundle_pb2, inference_pb2, parity_pb2
from service.call import STATUS
from service.metrics import COUNTERS, GAUGES, HISTOGRAMS, LIVE_COUNTERS, LIVE_GAUGES, PARITY
from service.settings import ENVIRONMENT_PREFIX, Settings

ROOT = Path(__file__).parents[2]
SOURCES = (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
OF_OTHERS = ("migrate.md",)  # has the options of those one comes from
DOCKER_S = {"--profile", "--scale", "--build-arg"}
FILES = (".json", ".py", ".toml")
LOADS = {"script": "src", "link": "href", "img": "src", "source": "src", "iframe": "src"}


class Page(HTMLParser):
    """What a page loads, where it leads, what can be led to in it, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads, self.links, self.ids = set[str](), set[str](), set[str]()
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        if tag in LOADS and values.get(LOADS[tag]):
            self.loads.add(values[LOADS[tag]])
        if tag == "a" and values.get("href"):
            self.links.add(values["href"])
        self.ids |= {values[name] for name in ("id", "name") if values.get(name)}

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--fresh-env"]
    built = subprocess.run(
        [*command, "docs", folder], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


@pytest.mark.slow
def test_every_file_is_a_page_of_the_navigation(site, pages):
    index = pages[site / "index.html"]
    led = {urldefrag(link).url for link in index.links}
    for source in (ROOT / "docs").rglob("*.md"):
        page = source.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert page == "index.html" or page in led, page


@pytest.mark.slow
def test_nothing_is_fetched_from_another_host(site, pages):
    for path, page in pages.items():
        for address in page.loads:
            assert not urlsplit(address).netloc, f"{path.name} loads {address}"
            assert _target(path, address).exists(), f"{path.name} loads {address}"
    for style in site.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", style.read_text("utf-8"))
        assert not found, style.name


@pytest.mark.slow
def test_every_link_of_a_page_leads_somewhere(pages):
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = _target(path, parts.path) if parts.path else path
            assert target.exists(), f"{path.name} links to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"


def _target(page: Path, address: str) -> Path:
    return Path((page.parent / unquote(urlsplit(address).path)).resolve())


@pytest.mark.slow
def test_every_command_and_option_is_in_the_reference(pages):
    for program, app in PROGRAMS.items():
        page = _page(pages, program)
        parsed: Any = get_command(app)
        shown = {name: one for name, one in parsed.commands.items() if not one.hidden}
        assert len(shown) > 5
        for name, one in shown.items():
            assert f"{program}-{name}" in page.ids
            if name == "doctor" and program == "serve-export":
                continue  # those of serve
            options = [option for param in one.params for option in param.opts if "--" in option]
            for option in options:
                assert f"cmdoption-{program}-{name}-{option.lstrip('-')}" in page.ids, option


@pytest.mark.slow
def test_every_setting_is_in_the_reference(pages):
    found = _page(pages, "settings").ids
    tables = config.as_tables(config.quick())
    names = list(_names(tables))
    assert len(names) > 40
    assert not [name for name in names if f"confval-{name}" not in found]
    words = "".join(_page(pages, "server").words)
    for name in Settings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in words
        assert f"{ENVIRONMENT_PREFIX}{name.upper()}" in words


def _names(tables, at=""):
    for name, value in tables.items():
        if isinstance(value, dict) and value:
            yield from _names(value, f"{at}{name}.")
        else:
            yield f"{at}{name}"


@pytest.mark.slow
def test_every_metric_status_call_and_message_is_in_the_reference(pages):
    metrics = "".join(_page(pages, "metrics").words).split()
    for name in (*COUNTERS, *GAUGES, *HISTOGRAMS, *PARITY, *LIVE_COUNTERS, *LIVE_GAUGES):
        assert name in metrics
    statuses = "".join(_page(pages, "statuses").words).split()
    assert not {status.name for status in STATUS.values()} - set(statuses)
    for module, name in (
        (inference_pb2, "inference"),
        (parity_pb2, "parity"),
        (bundle_pb2, "manifest"),
    ):
        words = " ".join(_page(pages, name).words).split()
        file = module.DESCRIPTOR
        methods = [method for one in file.services_by_name.values() for method in one.methods]
        messages = file.message_types_by_name.values()
        listed = [*methods, *messages, *(field for one in messages for field in one.fields)]
        assert not [one.full_name for one in listed if one.name not in words]


def _page(pages, name: str) -> Page:
    (found,) = [
        page for path, page in pages.items() if path.parts[-2:] == ("reference", f"{name}.html")
    ]
    return found


def test_every_option_and_setting_that_a_guide_names_is_there():
    options = {
        option
        for app in PROGRAMS.values()
        for command in cast("Any", get_command(app)).commands.values()
        for param in command.params
        for option in (*param.opts, *param.secondary_opts)
    }
    settings = set(_names(config.as_tables(config.quick())))
    sections = {name.partition(".")[0] for name in settings if "." in name}
    for path in SOURCES:
        if path.name in OF_OTHERS:
            continue
        for code in re.findall(r"`([^`\n]+)`", path.read_text(encoding="utf-8")):
            if found := re.match(r"--[a-z][a-z-]+", code):
                assert found[0] in options | DOCKER_S, f"{path.name}: {code}"
            found = re.fullmatch(r"([a-z]+)(\.[a-z_]+)+", code)
            if found and found[1] in sections:
                whole = any(name == code or name.startswith(f"{code}.") for name in settings)
                assert whole or Path(code).suffix in FILES, f"{path.name}: {code}"


def test_every_link_of_a_markdown_file_leads_somewhere():
    read = {path: _read(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert sum(len(links) for links, _ in read.values()) > 50
    for path, (links, _) in read.items():
        for link in links:
            parts = urlsplit(link)
            if parts.scheme or (link.startswith("#") and "reference" in path.parts):
                continue  # those of the reference lead to what is generated
            target = (path.parent / parts.path).resolve() if parts.path else path
            assert target.exists(), f"{path.name} links to {link}"
            if parts.fragment and target in read and "reference" not in target.parts:
                assert parts.fragment in read[target][1], f"{path.name} links to {link}"


def _read(text: str) -> tuple[list[str], set[str]]:
    """Return the links of a Markdown file, and the anchors that GitHub gives its headings."""
    tokens = MarkdownIt().enable("table").parse(text)
    inner = [child for one in tokens for child in one.children or ()]
    links = [
        str(one.attrs.get("href") or one.attrs["src"])
        for one in inner
        if one.type in ("link_open", "image")
    ]
    titles = [after.children or () for one, after in pairwise(tokens) if one.type == "heading_open"]
    plain = ["".join(one.content for one in title) for title in titles]
    return links, {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in plain}
