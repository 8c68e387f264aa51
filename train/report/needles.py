"""Answers about one place of a long document or video, by the length of the prompt and the depth of the place, as a grid."""

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any, Final

from visionloom.data.encode.encode import EncodedSample
from visionloom.train.observe.metrics import number
from visionloom.train.report.html import figure, mapping

TENTHS: Final = 10
"""Columns of a grid."""
LENGTHS_SHOWN: Final = 32
"""Most rows of a grid: powers of two."""
GRIDS_SHOWN: Final = 20
WIDTH, HEIGHT, LEFT = 44, 26, 80
"""Pixels of a cell, and of the lengths beside the rows."""

NeedleCell = tuple[str, int, int]
"""Task, longest prompt of the row in tokens, and tenth of the depth."""
NeedleGrid = dict[str, list[list[int]]]
"""By the longest prompt of each row, [right, asked] of each tenth."""


def place_of(sample: EncodedSample) -> NeedleCell | None:
    """Return the cell of a sample; None if its meta.depth does not say how deep in the prompt its needle is, from 0 to 1."""
    if sample.depth is None or sample.task is None:
        return None
    longest = 1 << max(0, sample.prompt_length - 1).bit_length()
    tenth = min(int(sample.depth * TENTHS), TENTHS - 1)
    return sample.task, longest, tenth


def grids_of(
    asked: Counter[NeedleCell | None], right: Counter[NeedleCell | None]
) -> dict[str, NeedleGrid]:
    """Return {task: {longest prompt: [[right, asked] of each tenth]}}, the shortest first."""
    grids: dict[str, NeedleGrid] = {}
    for task, length, _ in sorted(cell for cell in asked if cell is not None):
        cells = [(task, length, tenth) for tenth in range(TENTHS)]
        row = [[right[cell], asked[cell]] for cell in cells]
        grids.setdefault(task, {})[str(length)] = row
    return grids


def needle_grids(grids: Mapping[str, Any]) -> str:
    """Return a picture for each task; of a damaged file what can be read."""
    pictures = ""
    for task, rows in list(grids.items())[:GRIDS_SHOWN]:
        caption = (
            f"{task}: right answers by tokens of the prompt (at most) and depth of what is asked"
        )
        pictures += figure(_grid(mapping(rows)), caption)
    return pictures


def _grid(rows: Mapping[str, Any]) -> str:
    """Return a grid as SVG: green for right answers, red for wrong ones, nothing where nothing was asked."""
    shown = list(rows.items())[:LENGTHS_SHOWN]
    below = len(shown) * HEIGHT
    parts = [_row(line * HEIGHT, *row) for line, row in enumerate(shown)]
    for tenth in range(TENTHS):
        middle = LEFT + (tenth + 0.5) * WIDTH
        parts.append(_text(middle, below, f"{tenth * 10}%"))
    box = f"0 0 {LEFT + TENTHS * WIDTH} {below + HEIGHT}"
    style = 'width="100%" style="max-width:40em"'
    return f'<svg viewBox="{box}" {style}>{"".join(parts)}</svg>'


def _row(y: float, length: str, cells: Any) -> str:
    """Return the cells of one length after it."""
    row = _text(LEFT / 2, y, length)
    known = cells[:TENTHS] if isinstance(cells, list) else []
    for tenth, cell in enumerate(known):
        row += _cell(LEFT + tenth * WIDTH, y, cell)
    return row


def _cell(x: float, y: float, cell: Any) -> str:
    """Return one cell of [right, asked]."""
    values = cell if isinstance(cell, list) else []
    pair = [number(value) or 0.0 for value in values]
    if len(pair) != 2 or pair[1] <= 0:
        return ""
    share = min(max(pair[0] / pair[1], 0.0), 1.0)
    box = f'x="{x}" y="{y}" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="3"'
    # from red over yellow to green
    square = f'<rect {box} fill="hsl({120 * share:.0f},60%,70%)"/>'
    return square + _text(x + WIDTH / 2 - 1, y, f"{share:.0%}", "#111")


def _text(x: float, y: float, text: str, colour: str = "currentColor") -> str:
    place = f'x="{x}" y="{y + HEIGHT * 0.65}" font-size="12" text-anchor="middle"'
    return f'<text {place} fill="{colour}">{escape(text[:12])}</text>'
