"""plan.html: well-formed, to scale, without a network, and with every name escaped."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from visionloom.forecast.results import RunForecast
from visionloom.forecast.show import drawings
from visionloom.forecast.show.page import page_of
from visionloom.tests.forecast.made import (
    GIB,
    MICRO_BATCHES,
    STAGES,
    good_forecast,
    hostile_forecast,
    run_forecast,
)


class Reader(HTMLParser):
    """The names of elements, and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def read(forecast: RunForecast) -> Reader:
    reader = Reader()
    reader.feed(page_of(forecast))
    return reader


def svgs(forecast: RunForecast) -> list[ElementTree.Element]:
    """The drawings of a page, in their order: step, then memory and pipeline of each phase."""
    texts = re.findall(r"<svg.*?</svg>", page_of(forecast), re.DOTALL)
    return [ElementTree.fromstring(text) for text in texts]


def widths(svg: ElementTree.Element, kind: str) -> list[float]:
    return [float(box.attrib["width"]) for box in svg.iter("rect") if box.attrib["class"] == kind]


def test_the_page_shows_everything() -> None:
    text = read(run_forecast()).text
    for word in (
        "cannot run",
        "stage 0 takes 136.0 GiB of 79.6: parallel.recompute=full",
        "train/step.py:120 gradient_norm",
        "aten::mm",
        "layers 27-35, loss",
        "on more none was measured",
        "128,000",
    ):
        assert word in text
    assert "no gpu" not in text
    assert "can run\n" in read(good_forecast()).text


def test_the_page_needs_no_network_and_no_script() -> None:
    reader = read(run_forecast())
    assert reader.addresses == [] and "script" not in reader.elements


def test_memory_is_drawn_to_scale_against_the_card() -> None:
    _, memory, _ = svgs(run_forecast())
    weights, gradients = widths(memory, "piece-0"), widths(memory, "piece-1")
    assert len(weights) == STAGES
    assert gradients == pytest.approx([2 * width for width in weights], rel=1e-3)
    (limit,) = memory.iter("path")
    x = float(re.match(r"M([\d.]+) ", limit.attrib["d"])[1])  # type: ignore[index]
    # The card has 80 GiB, the weights take 10.
    assert x - drawings.LABELS == pytest.approx(8 * weights[0], rel=1e-2)
    assert [text.text for text in memory.iter("text") if text.get("class") == "over"] == [
        "136.0 GiB"
    ]


def test_the_timeline_has_every_pass_at_its_time() -> None:
    _, _, pipeline = svgs(run_forecast())
    forward, backward = widths(pipeline, "forward"), widths(pipeline, "backward")
    assert len(forward) == len(backward) == MICRO_BATCHES * STAGES
    assert backward == pytest.approx([2 * width for width in forward], rel=1e-2)
    ends = [float(box.attrib["x"]) + float(box.attrib["width"]) for box in pipeline.iter("rect")]
    # The last pass ends at 1.1 + 2.2 s of a step of 4 s.
    assert (max(ends) - 70) / (drawings.WIDTH - 70) == pytest.approx(3.3 / 4, rel=1e-3)


def test_a_long_step_shows_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawings, "MOST_SPANS", 10)
    _, _, pipeline = svgs(run_forecast())
    assert len(list(pipeline.iter("rect"))) == 10


def test_names_are_escaped() -> None:
    hostile = '</title><script src="http://x/y">"\'\x1b[2J'
    reader = read(hostile_forecast(hostile))
    assert "script" not in reader.elements and reader.addresses == []
    assert "\x1b" not in page_of(hostile_forecast(hostile))
    # The text itself is still to be read.
    assert reader.text.count("<script src=") >= 10


def test_a_phase_without_passes_or_waits_has_no_empty_parts() -> None:
    (phase, _) = good_forecast().phases
    ranks = tuple(replace(rank, waits=(), alive=()) for rank in phase.ranks)
    bare = replace(good_forecast(), phases=(replace(phase, ranks=ranks, timeline=()),))
    text = read(bare).text
    assert ": pipeline" not in text and ": the host" not in text and ": alive" not in text


def test_lines_that_wait_on_several_stages_have_one_row() -> None:
    text = read(good_forecast()).text
    assert "0, 1, 2, 3" in text and f"{GIB}" not in text
