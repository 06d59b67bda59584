"""Debian's Chromium, for tests of pages; where there is none they are skipped, and say so."""

import os
import shutil

import pytest

REQUIRED = "REQUIRE_CHROMIUM"


def chromium() -> str:
    """Return its path."""
    found = shutil.which("chromium")
    if found is None and os.environ.get(REQUIRED):
        pytest.fail(f"{REQUIRED} is set and there is no chromium; install it")
    if found is None:
        pytest.skip("NO CHROMIUM, pages were NOT looked at; install chromium")
    return found
