"""One PNG with a few samples of each dataset, pictures above, their text below."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from PIL import Image as PillowImage
from PIL import ImageDraw, ImageFont

from visionloom.data.config import MediaConfig
from visionloom.data.inspect.sample_view import SampleView, Shown, describe, view_sample
from visionloom.data.shards.dataset import Dataset

_CARD: Final = 320
"""Width of a sample's card in pixels."""
_PICTURES: Final = 200
"""Most height for the pictures on a card in pixels."""
_MARGIN: Final = 8
_LINE: Final = 14
_LINE_CHARACTERS: Final = 50
_MOST_LINES: Final = 60

Canvas = PillowImage.Image


def draw_contact_sheet(datasets: Mapping[str, Dataset], path: str | Path, columns: int = 4) -> None:
    """Draw the first `columns` samples of every dataset, one row each, as a PNG at `path`."""
    rows = []
    for name, dataset in datasets.items():
        first = range(min(columns, len(dataset)))
        views = [view_sample(dataset, index, MediaConfig()) for index in first]
        rows.append(_row(f"{name}: {len(dataset):,} samples", views, columns))
    _stack(rows).save(path, "PNG")


def draw_samples(
    views: Sequence[SampleView], title: str, path: str | Path, columns: int = 4
) -> None:
    """Draw samples as a PNG at `path`, `columns` in a row."""
    rows = []
    for start in range(0, len(views), columns):
        rows.append(_row("" if start else title, views[start : start + columns], columns))
    _stack(rows).save(path, "PNG")


def _stack(rows: Sequence[Canvas]) -> Canvas:
    width = max(row.width for row in rows)
    height = sum(row.height for row in rows)
    sheet = PillowImage.new("RGB", (width, height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _row(title: str, views: Sequence[SampleView], columns: int) -> Canvas:
    cards = [_card(view) for view in views]
    height = max(card.height for card in cards)
    row = PillowImage.new("RGB", (columns * _CARD, height + 24), "white")
    ImageDraw.Draw(row).text((_MARGIN, 6), title, "black", ImageFont.load_default(14))
    for column, card in enumerate(cards):
        row.paste(card, (column * _CARD, 24))
    return row


def _card(view: SampleView) -> Canvas:
    """Draw one sample: its pictures, and its text below."""
    pictures = [(_outlined(shown), shown.caption) for media in view.media for shown in media.shown]
    lines = _lines(view)
    side = _side(len(pictures))
    top = _height(len(pictures), side) + _MARGIN
    height = top + _LINE * len(lines) + _MARGIN
    card = PillowImage.new("RGB", (_CARD, height), "white")
    _paste_pictures(card, pictures, side)

    draw, font = ImageDraw.Draw(card), ImageFont.load_default(11)
    for number, line in enumerate(lines):
        draw.text((_MARGIN, top + number * _LINE), line, "black", font)
    return card


def _lines(view: SampleView) -> list[str]:
    """Return the text of a sample in lines that fit on a card."""
    lines: list[str] = []
    for turn in describe(view.sample):
        lines += textwrap.wrap(turn, _LINE_CHARACTERS) or [""]
    for media in view.media:
        lines += textwrap.wrap(media.problem, _LINE_CHARACTERS)
    # A long document would make its whole row as high.
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = ["..."]
    if view.sample.task:
        lines.append(f"(task {view.sample.task})")
    return lines


def _outlined(shown: Shown) -> Canvas:
    """Return the picture with its boxes and points in red."""
    picture = shown.picture.copy()
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    thick = max(1, max(picture.size) // 100)
    for mark in shown.marks:
        x, y = mark.place[0] * width, mark.place[1] * height
        if len(mark.place) == 4:
            # The last pixel of a box is inside of it.
            corner = (mark.place[2] * width - 1, mark.place[3] * height - 1)
            draw.rectangle((x, y, *corner), outline="red", width=thick)
        else:
            reach = 2 * thick
            around = (x - reach, y - reach, x + reach, y + reach)
            draw.ellipse(around, outline="red", width=thick)
    return picture


def _paste_pictures(card: Canvas, pictures: list[tuple[Canvas, str]], side: int) -> None:
    """Lay the pictures out in squares of `side` pixels, captions below."""
    draw, font = ImageDraw.Draw(card), ImageFont.load_default(10)
    for number, (picture, caption) in enumerate(pictures):
        row, column = divmod(number, _across(side))
        left = _MARGIN + column * (side + 4)
        top = _MARGIN + row * (side + 16)

        factor = side / max(picture.size)
        width = max(1, round(picture.width * factor))
        height = max(1, round(picture.height * factor))
        # Small pictures are to show their pixels.
        resampling = PillowImage.Resampling.LANCZOS
        if factor > 1:
            resampling = PillowImage.Resampling.NEAREST
        card.paste(picture.resize((width, height), resampling), (left, top))
        draw.text((left, top + height), caption, "gray", font)


def _side(count: int) -> int:
    """Return the largest side, in pixels, with which `count` squares fit into the space for pictures."""
    # 128 pixels still show something; below 12 nothing is to be seen anyway.
    for side in range(128, 8, -4):
        if _height(count, side) <= _PICTURES:
            return side
    return 8


def _across(side: int) -> int:
    return (_CARD - 2 * _MARGIN) // (side + 4)


def _height(count: int, side: int) -> int:
    """Return the height of `count` squares with their captions, in pixels."""
    return -(-count // _across(side)) * (side + 16)
