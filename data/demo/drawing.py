"""What the demo's samples are composed of: seeded draws of handwriting pictures, drafts of samples, and turns of a chat."""

import io
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from PIL import Image as PillowImage

from visionloom.data.encode.image import Pixels
from visionloom.data.shards.sample import Element, Image, Message, Sample, Text, Time

CELL: Final = 32
"""Pixels of a digit's cell: with patches of 16 pixels merged 2 x 2, one cell is one visual token."""
LONGEST_READING: Final = 16
"""Most entries that a reading names."""
NAMES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWX"
"""Names of pages: one token each."""
GRIDS: Final = ((1, 1), (1, 2), (2, 2))
"""Rows and columns of the pictures that questions are asked about."""
PLACES: Final = {
    (1, 2): ("left", "right"),
    (2, 2): ("top left", "top right", "bottom left", "bottom right"),
    (3, 3): (
        *("top left", "top", "top right"),
        *("left", "middle", "right"),
        *("bottom left", "bottom", "bottom right"),
    ),
}
"""Names of the cells of a grid, row by row."""

SHIFTS: Final = (
    *((0, 0), (0, 2), (0, -2)),
    *((2, 0), (-2, 0)),
)
"""Pixels by which a training picture is moved down and right: 1,397 are few, and alike in where they stand."""

DigitGrid = tuple[tuple[int | None, ...], ...]
"""Numbers of handwriting pictures by row and column; None is an empty cell."""
PlacedCell = tuple[int, tuple[int, int]] | None
"""A handwriting picture, and by how much it is moved."""


@dataclass
class DemoDraft:
    """The parts of a sample before it has an id."""

    messages: list[Message] = field(default_factory=list)
    content: list[Element] = field(default_factory=list)
    media: dict[str, bytes] = field(default_factory=dict)
    task: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def sample(self, sample_id: str) -> Sample:
        """Return the finished sample: a chat if there are messages, else a document."""
        kind = "chat" if self.messages else "doc"
        return Sample(
            sample_id,
            kind,
            tuple(self.messages),
            tuple(self.content),
            task=self.task,
            meta=self.meta,
        )


class Drawer:
    """Seeded draws from one split of the handwriting pictures, and their composition to PNG files."""

    def __init__(
        self,
        cells: Sequence[Pixels],
        digits: Sequence[int],
        numbers: Sequence[int],
        seed: str,
        shifts: Sequence[tuple[int, int]] = SHIFTS[:1],
    ) -> None:
        """`cells` uint8[32,32] and `digits` are of all pictures; `numbers` are those of this split."""
        self.random, self._shifts = random.Random(seed), shifts
        self.cells, self.digits = cells, digits
        self._by_digit: list[list[int]] = [[] for _ in range(10)]
        for number in numbers:
            self._by_digit[digits[number]].append(number)
        self._files: dict[tuple[tuple[PlacedCell, ...], ...], bytes] = {}

    def pictures(self, count: int, distinct: bool = False) -> list[int]:
        """Draw the numbers of `count` pictures, their digits uniform and, on request, distinct."""
        digits = range(10)
        if distinct:
            values = self.random.sample(digits, count)
        else:
            values = self.random.choices(digits, k=count)
        return [self.random.choice(self._by_digit[value]) for value in values]

    def image(self, draft: DemoDraft, grid: DigitGrid) -> Image:
        """Add the composed grid to the draft as its next picture."""
        ref = f"img{len(draft.media)}.png"
        draft.media[ref] = self.png(grid)
        return Image(ref, CELL * len(grid[0]), CELL * len(grid))

    def png(self, grid: DigitGrid) -> bytes:
        """Return the grid as a grey PNG file; single cells, which come often, are encoded once."""
        placed = tuple(tuple(map(self._placed, row)) for row in grid)
        if placed in self._files:
            return self._files[placed]
        rows = [np.concatenate([*map(self._cell, row)], axis=1) for row in placed]
        picture = PillowImage.fromarray(np.concatenate(rows))
        buffer = io.BytesIO()
        # Run lengths alone take half the time of full compression, and 3 % more bytes.
        picture.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
        if len(grid) == len(grid[0]) == 1:
            self._files[placed] = buffer.getvalue()
        return buffer.getvalue()

    def digit(self, number: int) -> str:
        """Return the digit that a picture shows."""
        return str(self.digits[number])

    def _placed(self, number: int | None) -> PlacedCell:
        return None if number is None else (number, self.random.choice(self._shifts))

    def _cell(self, placed: PlacedCell) -> Pixels:
        """Return a cell, black where nothing is and where a moved picture has left."""
        if placed is None:
            return np.zeros((CELL, CELL), np.uint8)
        number, (down, right) = placed
        picture = PillowImage.fromarray(self.cells[number])
        inverse = (1, 0, -right, 0, 1, -down)
        return np.asarray(picture.transform((CELL, CELL), PillowImage.Transform.AFFINE, inverse))


def grid_of(pictures: Sequence[int | None], columns: int) -> DigitGrid:
    """Lay pictures out row by row."""
    starts = range(0, len(pictures), columns)
    return tuple(tuple(pictures[start : start + columns]) for start in starts)


def turn_of(question: Sequence[Element], answer: Sequence[Element]) -> list[Message]:
    """Return a question and its answer."""
    return [Message("user", tuple(question)), Message("assistant", tuple(answer))]


@dataclass(frozen=True)
class Entries:
    """Names that a document, a video or a list gives, each with a digit."""

    names: Sequence[Sequence[Text | Time]]
    values: Sequence[str]
    question: Callable[[int], Sequence[Element]]
    """Asks for the value of the entry at a place."""

    def answer(self, place: int) -> list[Element]:
        """Return the name and, right after it, the value.

        A name next to its value is what attention learns to look up first; with a colon and a space between them a
        list of four is not read after 200 steps (measured).
        """
        return [*self.names[place], Text(self.values[place])]

    def reading(self, order: Sequence[int]) -> list[Element]:
        """Return a line of name and value for each place of `order`, supervised at the values alone.

        In an order that nobody can foresee, the names would only add noise to the loss.
        """
        lines: list[Element] = []
        for row, place in enumerate(order):
            if row:
                lines.append(Text("\n", loss=0.0))
            for name in self.names[place]:
                lines.append(replace(name, loss=0.0))
            lines.append(Text(self.values[place]))
        return lines


def ask(
    draws: random.Random, entries: Entries, opening: Sequence[Element], training: bool
) -> list[Message]:
    """Return a chat about entries after its opening: one question, and in training the reading of all after it.

    A reading has a supervised value every seven tokens; a question of its own takes twenty-five.
    """
    places = range(len(entries.values))
    asked = draws.choice(places)
    messages = turn_of([*opening, *entries.question(asked)], entries.answer(asked))
    if training:
        # After the question: the test asks in the first turn, and what training asks second is unknown there.
        order = draws.sample(places, len(places))
        reading = entries.reading(order[:LONGEST_READING])
        messages += turn_of([Text("Read all of them in any order.")], reading)
    return messages
