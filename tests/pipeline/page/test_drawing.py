import re
from xml.etree import ElementTree

import numpy as np
import pytest

from pipeline.page.drawing import VARIABLES, Page

COUNTS = np.zeros((3, 62), np.int64)
COUNTS[0, 0], COUNTS[1, 20:30], COUNTS[2, -1] = 9, 5, 4


def curves(page, **more):
    return page.curves({"a": ([1, 2], [0.5, 0.25]), "b": ([1, 2], [0.6, 0.3])}, "Loss", **more)


FIGURES = {
    "curves": lambda page: curves(page, marked=2),
    "shares": lambda page: curves(page, percent=True),
    "one epoch": lambda page: page.curves({"a": ([1], [0.5])}, "Loss"),
    "wide": lambda page: page.curves({"a": ([1, 2], [1e-4, 1e3])}, "Loss"),
    "not finite": lambda page: page.curves({"a": ([1, 2], [np.nan, np.inf])}, "Loss"),
    "reliability": lambda page: page.reliability(
        np.array([0, 5, 4]), np.array([0, 2.5, 3.6]), np.array([0, 3, 4]), "Calibration"
    ),
    "points": lambda page: page.points(np.array([1.0, 2]), np.array([1.1, np.nan]), "Answers"),
    "no points": lambda page: page.points(np.array([np.nan]), np.array([np.nan]), "Answers"),
    "ridges": lambda page: page.ridges(
        ["$same$", "<near>", "far"],
        COUNTS,
        [(0, True), (0.3, True), (float("nan"), False)],
        (-7, 3),
        "Distribution",
    ),
    "costs": lambda page: page.costs(
        ["a", "b"],
        {"accuracy": [(0.9, "90 %"), (0.8, "80 %")], "ms": [(1.0, "1"), (float("nan"), "none")]},
        "Costs",
        interval=[(0.8, 0.95), (0.7, 0.9)],
        columns=2,
    ),
    "costs below each other": lambda page: page.costs(
        ["a"], {name: [(0.0, "0")] for name in "xyz"}, "Costs", columns=2
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_an_image_with_a_label_in_the_pages_own_colours(name):
    drawn = FIGURES[name](Page())

    root = ElementTree.fromstring(drawn)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert "width" not in root.attrib
    assert "viewBox" in root.attrib
    assert not any(colour in drawn for colour in VARIABLES)
    written = {one.lower() for one in re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", drawn)}
    assert not written - {"#ffffff"}
    assert "<style" not in drawn
    assert "DejaVu" not in drawn


def test_the_ids_of_a_pages_figures_are_apart_and_lead_to_each_other():
    page = Page()

    drawn = "".join(one(page) for one in FIGURES.values())

    ids = re.findall(r' id="([^"]+)"', drawn)
    used = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', drawn)
    assert len(ids) == len(set(ids))
    assert set(used) == set(ids)


def test_a_figure_is_the_same_each_time():
    assert FIGURES["ridges"](Page()) == FIGURES["ridges"](Page())


def test_names_are_escaped_and_their_dollar_signs_are_no_formula():
    drawn = FIGURES["ridges"](Page())

    assert "&lt;near&gt;" in drawn
    assert "$same$" in drawn


@pytest.mark.parametrize(
    ("values", "marks"),
    [([0.02, 2.0], ["0.05", "0.1", "1"]), ([1e-4, 1e3], ["0.01", "1", "100"])],
)
def test_a_logarithmic_axis_is_marked_with_numbers_and_no_formula(values, marks):
    drawn = Page().curves({"a": ([1, 2], values)}, "Loss")

    assert "mathdefault" not in drawn
    for mark in marks:
        assert f">{mark}</text>" in drawn


def test_the_label_is_escaped():
    drawn = Page().curves({"a": ([1], [1])}, '"><script>')

    assert "<script>" not in drawn
