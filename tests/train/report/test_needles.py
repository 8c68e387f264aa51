"""Grids of needles: cells counted by hand, and files that strangers wrote."""

from collections import Counter
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

from visionloom.train.report.needles import grids_of, needle_grids, place_of


def asked(length: int, depth: float | None) -> Any:
    return SimpleNamespace(task="needle", prompt_length=length, depth=depth)


def test_cells_are_counted() -> None:
    samples = [(1000, 0.0, True), (1024, 0.09, False), (1025, 1.0, True), (1025, None, True)]
    counts, right = Counter[Any](), Counter[Any]()
    for length, depth, correct in samples:
        place = place_of(asked(length, depth))
        if place is not None:
            counts[place] += 1
            right[place] += correct
    rows = grids_of(counts, right)["needle"]
    assert rows == {"1024": [[1, 2], *[[0, 0]] * 9], "2048": [*[[0, 0]] * 9, [1, 1]]}
    picture = needle_grids({"needle": rows})
    assert picture.count("<rect") == 2 and "50%" in picture and "100%" in picture


def test_pages_are_whole_whatever_a_file_says() -> None:
    """Reference: an XML parser."""
    rows = {"<b>": [["x", 1], [2, 0], 3, [1e9, 1], [float("nan"), 1]], "2": "no", "3": [[1, 2, 3]]}
    picture = needle_grids({"<script>": rows, "other": [1]})
    ElementTree.fromstring(f"<p>{picture}</p>")
    assert "<script>" not in picture and "<b>" not in picture
