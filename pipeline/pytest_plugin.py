"""Parity in a user's own pytest run: the fixtures `parity_bundle` and `parity_check`.

Loaded with every pytest where this package is installed, so it imports nothing slow until a fixture
is asked for.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pipeline.check import Found
    from protos import bundle_pb2

OPTION = "parity_bundle"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --parity-bundle, and the same in pytest's own settings."""
    text = "bundle (NAME/VERSION) that the fixture parity_bundle checks"
    parser.getgroup("train-export").addoption(
        "--parity-bundle", metavar="DIR", default=None, help=text
    )
    parser.addini(OPTION, text)


class Parity:
    """What a check has found, for tests to ask."""

    def __init__(self, found: "Found") -> None:
        """Store it."""
        self._found = found
        self.reports: dict[str, bundle_pb2.ParityReport] = {
            report.variant: report for report in found.reports
        }

    def assert_parity(self, variant: str | None = None) -> None:
        """Fail the test with one sentence where a variant, or any, does not hold its parity.

        Args:
            variant: its name, as in `reports`; None: all of them.
        """
        __tracebackhide__ = True
        if variant is not None and variant not in self.reports:
            pytest.fail(
                f"there is no variant {variant!r}, only {', '.join(sorted(self.reports))}",
                pytrace=False,
            )
        for name in self.reports if variant is None else [variant]:
            if not self.reports[name].passed:
                pytest.fail(
                    f"parity does not hold, {name}: {self.reports[name].failure}", pytrace=False
                )


@pytest.fixture(scope="session")
def parity_bundle(pytestconfig: pytest.Config) -> Parity:
    """Check the bundle of --parity-bundle, once a run: digests, labels, and every variant."""
    given = pytestconfig.getoption(OPTION) or pytestconfig.getini(OPTION)
    if not given:
        pytest.fail("name a bundle with --parity-bundle, or parity_bundle in pytest's settings")
    from pipeline import check  # noqa: PLC0415  TensorFlow: not before it is asked for

    return Parity(_checked(lambda: check.whole_bundle(pytestconfig.rootpath / given)))


@pytest.fixture(scope="session")
def parity_check() -> Callable[..., Parity]:
    """Return a function (reference, candidate, data, precision="float32") that holds two files."""
    from pipeline import check, questions  # noqa: PLC0415

    def hold(
        reference: str | Path, candidate: str | Path, data: str | Path, precision: str = "float32"
    ) -> Parity:
        asked = questions.read(Path(data))
        return Parity(
            _checked(
                lambda: check.pair(Path(reference), Path(candidate), asked, precision=precision)
            )
        )

    return hold


def _checked(work: "Callable[[], Found]") -> "Found":
    from pipeline.errors import CheckError  # noqa: PLC0415

    try:
        return work()
    except CheckError as error:
        pytest.fail(str(error), pytrace=False)
