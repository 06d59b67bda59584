"""Debian's Chromium, for tests of pages; where there is none they are skipped, and say so."""

import os
import shutil
import subprocess

import pytest

REQUIRED = "REQUIRE_CHROMIUM"
APT = ("apt-get", "--quiet", "--option", "DPkg::Lock::Timeout=300")  # two tests may ask at once


def chromium() -> str:
    """Return its path. Where it is required and may be installed, it is."""
    required = bool(os.environ.get(REQUIRED))
    found = shutil.which("chromium") or (_installed() if required else None)
    if found is None and required:
        pytest.fail(f"{REQUIRED} is set and there is no chromium; install it")
    if found is None:
        pytest.skip("NO CHROMIUM, pages were NOT looked at; install chromium")
    return found


def _installed() -> str | None:
    if os.geteuid() == 0 and shutil.which("apt-get"):
        for words in (("update",), ("install", "--yes", "--no-install-recommends", "chromium")):
            subprocess.run((*APT, *words), capture_output=True, check=False, timeout=500)
    return shutil.which("chromium")
