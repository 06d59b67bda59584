"""The page of a model, report.html: one file with everything in it, made from a bundle.

Needs no network and runs no script. Shows what was recorded; judges nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline import files
from pipeline.errors import CheckError
from pipeline.page import comparing, evidence, shown, words
from pipeline.page.evidence import Evidence
from protos import bundle_pb2
from service import bundle

FILE = "report.html"
Manifest = bundle_pb2.BundleManifest


def write(path: Path, manifest: Manifest) -> Path:
    """Write the page of a bundle that is being published, into it.

    Args:
        path: of the bundle; its evidence is read, if there is any.
        manifest: of it, whole but for the page itself.

    Returns:
        The path of the page.
    """
    page = path / FILE
    files.write_whole(page, render(manifest, _evidence(path, manifest)).encode())
    return page


def write_refused(folder: Path, manifest: Manifest, found: Evidence, why: Sequence[str]) -> Path:
    """Write the page of a model that is not published, into the folder of its run.

    Args:
        folder: of the run.
        manifest: what is known of the model.
        found: its answers.
        why: what it did not reach, a part of a sentence each.

    Returns:
        The path of the page.
    """
    page = folder / FILE
    files.write_whole(page, render(manifest, found, why=why).encode())
    return page


def render(manifest: Manifest, found: Evidence, *, why: Sequence[str] = ()) -> str:
    """Return the page of a model as HTML; refused if there is a reason why."""
    return _filled("model.html.j2", why=list(why), **shown.context(manifest, found))


def of_bundle(path: Path) -> str:
    """Return the page of a published bundle as HTML, once every file of it is verified.

    Raises:
        BundleError: a file is not what the manifest says.
        CheckError: its evidence cannot be shown.
    """
    manifest = bundle.read(path).manifest
    with _translated(path):
        return render(manifest, _evidence(path, manifest))


def of_two(first: Path, second: Path) -> tuple[str, comparing.Comparison]:
    """Return a page that holds two published bundles against each other, and its figures.

    Raises:
        BundleError: a file is not what its manifest says.
        CheckError: the evidence of one cannot be shown.
    """
    manifests = [bundle.read(path).manifest for path in (first, second)]
    founds = [_evidence(path, one) for path, one in zip((first, second), manifests, strict=True)]
    with _translated(first):
        compared = comparing.compare(manifests, founds)
        return _filled("compared.html.j2", **comparing.context(manifests, compared)), compared


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Name the bundle whose figures contradict each other."""
    try:
        yield
    except (ValueError, IndexError, TypeError, KeyError) as error:
        raise CheckError(
            f"{bundle.shown(path)} cannot be shown, its figures contradict each other: {error}; "
            "publish it again"
        ) from error


def _evidence(path: Path, manifest: Manifest) -> Evidence:
    """Read a bundle's evidence; older ones have none."""
    if all(one.path != evidence.FILE for one in manifest.files):
        return Evidence.empty()
    return Evidence.parse((path / evidence.FILE).read_bytes(), bundle.shown(path, evidence.FILE))


def _filled(template: str, **values: Any) -> str:  # noqa: ANN401  as the template takes them
    environment = Environment(
        loader=PackageLoader("pipeline.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: words.plain(value) if type(value) is str else value,
    )
    for one in (
        words.percent, words.count, words.tiny, words.size, words.milliseconds, words.duration,
        words.large, words.chance, words.date,
    ):  # fmt: skip
        environment.filters[one.__name__] = one
    return environment.get_template(template).render(**values)
