"""One PNG that shows what is in datasets: a few samples of each, pictures above, their text below."""

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
        views = [
            view_sample(dataset, index, MediaConfig())
            for index in range(min(columns, len(dataset)))
        ]
        rows.append(_row(f"{name}: {len(dataset):,} samples", views, columns))
    _stack(rows).save(path, "PNG")


def draw_samples(
    views: Sequence[SampleView], title: str, path: str | Path, columns: int = 4
) -> None:
    """Draw samples as a PNG at `path`, `columns` in a row."""
    rows = [
        _row(title if not start else "", views[start : start + columns], columns)
        for start in range(0, len(views), columns)
    ]
    _stack(rows).save(path, "PNG")


def _stack(rows: Sequence[Canvas]) -> Canvas:
    sheet = PillowImage.new(
        "RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white"
    )
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    return sheet


def _row(title: str, views: Sequence[SampleView], columns: int) -> Canvas:
    cards = [_card(view) for view in views]
    row = PillowImage.new(
        "RGB", (columns * _CARD, max(card.height for card in cards) + 24), "white"
    )
    ImageDraw.Draw(row).text((_MARGIN, 6), title, "black", ImageFont.load_default(14))
    for column, card in enumerate(cards):
        row.paste(card, (column * _CARD, 24))
    return row


def _card(view: SampleView) -> Canvas:
    sample = view.sample
    pictures = [(_outlined(shown), shown.caption) for media in view.media for shown in media.shown]
    lines = [
        part for line in describe(sample) for part in textwrap.wrap(line, _LINE_CHARACTERS) or [""]
    ]
    lines += [
        part
        for media in view.media
        if media.problem
        for part in textwrap.wrap(media.problem, _LINE_CHARACTERS)
    ]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = ["..."]
    if sample.task:
        lines.append(f"(task {sample.task})")
    side = _side(len(pictures))
    top = _height(len(pictures), side) + _MARGIN
    card = PillowImage.new("RGB", (_CARD, top + _LINE * len(lines) + _MARGIN), "white")
    _paste_pictures(card, pictures, side)
    for number, line in enumerate(lines):
        ImageDraw.Draw(card).text(
            (_MARGIN, top + number * _LINE), line, "black", ImageFont.load_default(11)
        )
    return card


def _outlined(shown: Shown) -> Canvas:
    """The picture with its boxes and points in red."""
    picture = shown.picture.copy()
    draw, thick = ImageDraw.Draw(picture), max(1, max(picture.size) // 100)
    for mark in shown.marks:
        places = [share * picture.size[axis % 2] for axis, share in enumerate(mark.place)]
        if len(places) == 4:
            draw.rectangle(
                (places[0], places[1], places[2] - 1, places[3] - 1), outline="red", width=thick
            )
        else:
            x, y, reach = *places, 2 * thick
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline="red", width=thick)
    return picture


def _paste_pictures(card: Canvas, pictures: list[tuple[Canvas, str]], side: int) -> None:
    """Lay the pictures out in squares of `side` pixels, captions below."""
    across = _across(side)
    for number, (picture, caption) in enumerate(pictures):
        left, top = _MARGIN + number % across * (side + 4), _MARGIN + number // across * (side + 16)
        factor = side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        resampling = (
            PillowImage.Resampling.NEAREST if factor > 1 else PillowImage.Resampling.LANCZOS
        )
        card.paste(picture.resize(size, resampling), (left, top))
        ImageDraw.Draw(card).text(
            (left, top + size[1]), caption, "gray", ImageFont.load_default(10)
        )


def _side(count: int) -> int:
    """The largest side with which `count` squares fit into the space for pictures."""
    return next((side for side in range(128, 8, -4) if _height(count, side) <= _PICTURES), 8)


def _across(side: int) -> int:
    return (_CARD - 2 * _MARGIN) // (side + 4)


def _height(count: int, side: int) -> int:
    """Height of `count` squares with their captions, in pixels."""
    return -(-count // _across(side)) * (side + 16)
