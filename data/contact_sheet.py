"""One PNG that shows what is in datasets: a few samples of each, pictures above, their text below."""

import io
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from visionloom.data.sample import Box, Element, Image, Point, Sample, Text, Think, Time, ToolCall, Video
from visionloom.data.shards import Dataset

_CARD: Final = 320
"""Width of a sample's card in pixels."""
_PICTURES: Final = 200
"""Most height for the pictures on a card in pixels."""
_MARGIN: Final = 8
_LINE: Final = 14
_LINE_CHARACTERS: Final = 50

Canvas = PillowImage.Image


def draw_contact_sheet(datasets: Mapping[str, Dataset], path: str | Path, columns: int = 4) -> None:
    """Draw the first `columns` samples of every dataset, one row each, as a PNG at `path`."""
    rows = [_row(name, dataset, columns) for name, dataset in datasets.items()]
    sheet = PillowImage.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    sheet.save(path, "PNG")


def describe(sample: Sample) -> list[str]:
    """The sample as lines of text: one a turn, media as [image] and [video]."""
    if sample.kind == "doc":
        return [_text(sample.content)]
    return [f"{message.role}: {_text(message.content)}" for message in sample.messages]


def _row(name: str, dataset: Dataset, columns: int) -> Canvas:
    cards = [_card(dataset, index) for index in range(min(columns, len(dataset)))]
    row = PillowImage.new("RGB", (columns * _CARD, max(card.height for card in cards) + 24), "white")
    ImageDraw.Draw(row).text((_MARGIN, 6), f"{name}: {len(dataset):,} samples", "black", ImageFont.load_default(14))
    for column, card in enumerate(cards):
        row.paste(card, (column * _CARD, 24))
    return row


def _card(dataset: Dataset, index: int) -> Canvas:
    sample = dataset.sample(index)
    pictures = _pictures(dataset, index, sample)
    lines = [part for line in describe(sample) for part in textwrap.wrap(line, _LINE_CHARACTERS) or [""]]
    if sample.task:
        lines.append(f"(task {sample.task})")
    side = _side(len(pictures))
    top = _height(len(pictures), side) + _MARGIN
    card = PillowImage.new("RGB", (_CARD, top + _LINE * len(lines) + _MARGIN), "white")
    _paste_pictures(card, pictures, side)
    for number, line in enumerate(lines):
        ImageDraw.Draw(card).text((_MARGIN, top + number * _LINE), line, "black", ImageFont.load_default(11))
    return card


def _pictures(dataset: Dataset, index: int, sample: Sample) -> list[tuple[Canvas, str]]:
    """The sample's pictures and frames with their captions: the frame's time, or nothing."""
    pictures: list[tuple[Canvas, str]] = []
    for element in sample.elements:
        if isinstance(element, Image):
            picture = _open(dataset.member(index, element.ref))
            _outline(picture, [box for box in sample.elements if isinstance(box, Box) and box.image == len(pictures)])
            pictures.append((picture, ""))
        elif isinstance(element, Video):
            for ref, time in zip(element.frames, element.times, strict=True):
                pictures.append((_open(dataset.member(index, ref)), f"{time:g} s"))
    return pictures


def _open(data: bytes) -> Canvas:
    return PillowImage.open(io.BytesIO(data)).convert("RGB")


def _outline(picture: Canvas, boxes: list[Box]) -> None:
    for box in boxes:
        scale = (1.0, 1.0) if box.space == "px" else (picture.width / 1000, picture.height / 1000)
        x1, y1, x2, y2 = box.xyxy
        corners = (x1 * scale[0], y1 * scale[1], x2 * scale[0] - 1, y2 * scale[1] - 1)
        ImageDraw.Draw(picture).rectangle(corners, outline="red")


def _paste_pictures(card: Canvas, pictures: list[tuple[Canvas, str]], side: int) -> None:
    """Lay the pictures out in squares of `side` pixels, captions below."""
    across = _across(side)
    for number, (picture, caption) in enumerate(pictures):
        left, top = _MARGIN + number % across * (side + 4), _MARGIN + number // across * (side + 16)
        factor = side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        card.paste(picture.resize(size, PillowImage.Resampling.NEAREST), (left, top))
        ImageDraw.Draw(card).text((left, top + size[1]), caption, "gray", ImageFont.load_default(10))


def _side(count: int) -> int:
    """The largest side with which `count` squares fit into the space for pictures."""
    return next((side for side in range(128, 8, -4) if _height(count, side) <= _PICTURES), 8)


def _across(side: int) -> int:
    return (_CARD - 2 * _MARGIN) // (side + 4)


def _height(count: int, side: int) -> int:
    """Height of `count` squares with their captions, in pixels."""
    return -(-count // _across(side)) * (side + 16)


def _text(elements: tuple[Element, ...]) -> str:
    return "".join(map(_element_text, elements))


def _element_text(element: Element) -> str:
    match element:
        case Text():
            return element.text
        case Think():
            return f"<think>{element.text}</think> "
        case Image():
            return "[image]"
        case Video():
            return "[video]"
        case Box():
            return f"[box {_numbers(element.xyxy)}{_label(element)}]"
        case Point():
            return f"[point {_numbers(element.xy)}{_label(element)}]"
        case Time():
            return f"<{element.seconds:g} seconds>"
        case ToolCall():
            return f"[call {element.name}]"


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _label(element: Box | Point) -> str:
    return "" if element.label is None else f": {element.label}"
