"""The samples of the demo: eight datasets composed from handwritten digits, every phase of training in miniature.

Each maker takes a `Drawer` (seeded draws and pictures) and returns a draft: the sample's parts and its media. The
`meta` of a sample holds the numbers of its handwriting pictures, so that every answer can be checked.
"""

import io
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from PIL import Image as PillowImage

from visionloom.data.encode.image import Pixels
from visionloom.data.shards.sample import (
    Box,
    Element,
    Image,
    Message,
    Sample,
    Text,
    Think,
    Time,
    Video,
)

CELL: Final = 32
"""Pixels of a digit's cell: with patches of 16 pixels merged 2 x 2, one cell is one visual token."""
NAMES: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GRIDS: Final = ((1, 1), (1, 2), (2, 2))
PLACES: Final = {
    (1, 2): ("left", "right"),
    (2, 2): ("top left", "top right", "bottom left", "bottom right"),
}

DigitGrid = tuple[tuple[int | None, ...], ...]
"""Numbers of handwriting pictures by row and column; None is an empty cell."""


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
    ) -> None:
        """`cells` uint8[32,32] and `digits` are of all pictures; `numbers` are those of this split."""
        self.random = random.Random(seed)
        self.cells, self.digits = cells, digits
        self._by_digit: list[list[int]] = [[] for _ in range(10)]
        for number in numbers:
            self._by_digit[digits[number]].append(number)
        self._files: dict[DigitGrid, bytes] = {}

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
        if grid in self._files:
            return self._files[grid]
        rows = []
        for row in grid:
            rows.append(np.concatenate([self._cell(number) for number in row], axis=1))
        picture = PillowImage.fromarray(np.concatenate(rows))
        buffer = io.BytesIO()
        # Run lengths alone take half the time of full compression, and 3 % more bytes.
        picture.save(buffer, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
        if len(grid) == len(grid[0]) == 1:
            self._files[grid] = buffer.getvalue()
        return buffer.getvalue()

    def digit(self, number: int) -> str:
        """Return the digit that a picture shows."""
        return str(self.digits[number])

    def _cell(self, number: int | None) -> Pixels:
        return np.zeros((CELL, CELL), np.uint8) if number is None else self.cells[number]


def grid_of(pictures: Sequence[int | None], columns: int) -> DigitGrid:
    """Lay pictures out row by row."""
    starts = range(0, len(pictures), columns)
    return tuple(tuple(pictures[start : start + columns]) for start in starts)


def _turn(question: Sequence[Element], answer: Sequence[Element]) -> list[Message]:
    """Return a question and its answer."""
    return [Message("user", tuple(question)), Message("assistant", tuple(answer))]


def captions(drawer: Drawer, training: bool) -> DemoDraft:
    """Draw a picture of 1, 1 x 2 or 2 x 2 digits and say what it shows."""
    rows, columns = drawer.random.choice(GRIDS)
    pictures = drawer.pictures(rows * columns)
    draft = DemoDraft(meta={"pictures": pictures, "columns": columns})
    lines = []
    for start in range(0, len(pictures), columns):
        lines.append(" ".join(map(drawer.digit, pictures[start : start + columns])))
    image = drawer.image(draft, grid_of(pictures, columns))
    draft.content = [image, Text(f"\nThe image shows: {' / '.join(lines)}")]
    return draft


def text(drawer: Drawer, training: bool) -> DemoDraft:
    """Write text only: sums, sequences, names of digits, and, most often, looking up a page or a moment."""
    makers = (_text_sum, _text_sequence, _text_names, _text_pages, _text_moments)
    # Looking up prepares for long documents and videos, which ask the same of pictures.
    (make,) = drawer.random.choices(makers, weights=(2, 1, 1, 3, 3))
    return make(drawer)


def _text_sum(drawer: Drawer) -> DemoDraft:
    count = drawer.random.choice((2, 3))
    values = drawer.random.choices(range(10), k=count)
    steps, total = sum_steps(values)
    question = f"What is {' + '.join(map(str, values))}?"
    return DemoDraft(messages=_turn([Text(question)], [Think(steps), Text(str(total))]))


def _text_sequence(drawer: Drawer) -> DemoDraft:
    first, step = drawer.random.randrange(5), drawer.random.choice((1, 2, 3))
    numbers = range(first, first + 6 * step, step)
    return DemoDraft(content=[Text("Sequence: " + " ".join(map(str, numbers)))])


def _text_names(drawer: Drawer) -> DemoDraft:
    values = drawer.random.sample(range(10), 4)
    names = [f"{NAMES[value]} is {value}" for value in values]
    return DemoDraft(content=[Text(". ".join(names))])


def _text_pages(drawer: Drawer) -> DemoDraft:
    first = drawer.random.randrange(1, 20)
    numbers = range(first, first + drawer.random.randrange(3, 7))
    pages = [[Text(f"Page {number}")] for number in numbers]

    def question(page: int) -> list[Element]:
        return [Text(f"Which digit is on page {first + page}?")]

    return _lookup(drawer, pages, question)


def _text_moments(drawer: Drawer) -> DemoDraft:
    first = drawer.random.randrange(4) + 0.5
    seconds = set[float]()
    for place in range(drawer.random.randrange(2, 6)):
        # two of them may fall together: then there is one less
        seconds.add(first + place * drawer.random.choice((1, 2)))
    moments = [Time(moment) for moment in sorted(seconds)]

    def question(place: int) -> list[Element]:
        return [Text("Which digit is shown at "), moments[place], Text("?")]

    return _lookup(drawer, [[moment] for moment in moments], question)


def _lookup(
    drawer: Drawer,
    names: Sequence[Sequence[Element]],
    question: Callable[[int], list[Element]],
) -> DemoDraft:
    """Write a list of names with a digit each, and questions for some of the digits."""
    values = drawer.random.choices(range(10), k=len(names))
    opening: list[Element] = []
    for name, value in zip(names, values, strict=True):
        opening += [*name, Text(f": {value} ")]
    opening.append(Text("\n"))

    draft = DemoDraft()
    count = min(3, len(names))
    for asked in drawer.random.sample(range(len(names)), count):
        answer = [*names[asked], Text(f": {values[asked]}")]
        draft.messages += _turn([*opening, *question(asked)], answer)
        # the list stands before the first question only
        opening = []
    return draft


def vqa(drawer: Drawer, training: bool) -> DemoDraft:
    """Ask for one digit, or for the digit at a place of a 1 x 2 or 2 x 2 grid."""
    ((rows, columns),) = drawer.random.choices(GRIDS, weights=(3, 3, 4))
    pictures = drawer.pictures(rows * columns)
    draft = DemoDraft(meta={"pictures": pictures, "columns": columns})
    image = drawer.image(draft, grid_of(pictures, columns))
    if len(pictures) == 1:
        draft.task, asked = "read", 0
        question = "Which digit is this?"
    else:
        draft.task, asked = "position", drawer.random.randrange(len(pictures))
        draft.meta["asked"] = asked
        question = f"Which digit is at the {PLACES[rows, columns][asked]}?"
    answer = drawer.digit(pictures[asked])
    draft.messages = _turn([image, Text(question)], [Text(answer)])
    return draft


def grounding(drawer: Drawer, training: bool) -> DemoDraft:
    """Ask where one of several distinct digits lies on a canvas of 64 or 96 pixels; for two of them in training."""
    side = drawer.random.choice((2, 3))
    pictures = drawer.pictures(drawer.random.randrange(2, side + 2), distinct=True)
    cells = drawer.random.sample(range(side * side), len(pictures))
    placed: list[int | None] = [None] * (side * side)
    for cell, number in zip(cells, pictures, strict=True):
        placed[cell] = number
    asked = drawer.random.sample(range(len(pictures)), 2 if training else 1)

    meta = {"pictures": pictures, "cells": cells, "columns": side, "asked": asked}
    draft = DemoDraft(task="grounding", meta=meta)
    opening: list[Element] = [drawer.image(draft, grid_of(placed, side))]
    for index in asked:
        digit = drawer.digit(pictures[index])
        row, column = divmod(cells[index], side)
        left, top = column * CELL, row * CELL
        box = Box(0, (left, top, left + CELL, top + CELL), "px", digit)
        draft.messages += _turn([*opening, Text(f"Where is the {digit}?")], [box])
        opening = []
    return draft


def interleaved(drawer: Drawer, training: bool) -> DemoDraft:
    """Write a document of two or three pictures and text in turn, ending with the sum."""
    pictures = drawer.pictures(drawer.random.choice((2, 3)))
    draft = DemoDraft(meta={"pictures": pictures})
    total = 0
    for position, number in enumerate(pictures):
        digit = drawer.digit(number)
        total += int(digit)
        opening = Text("First comes " if position == 0 else " Then ")
        image = drawer.image(draft, ((number,),))
        draft.content += [opening, image, Text(f", a {digit}.")]
    draft.content.append(Text(f" The sum is {total}."))
    return draft


def video(drawer: Drawer, training: bool) -> DemoDraft:
    """Make a clip of 4, 6 or 8 frames at 1 or 2 frames a second, and ask what is shown at a moment.

    The digit changes with every pair of frames, which is one temporal patch. The moments asked for are the middles of
    pairs.
    """
    fps = drawer.random.choice((1, 2))
    pictures = drawer.pictures(drawer.random.choice((2, 3, 4)), distinct=True)
    # A quarter second late at 2 frames a second, so that all middles have one exact decimal (x.5).
    start = drawer.random.randrange(3) + (0.25 if fps == 2 else 0.0)
    draft = DemoDraft(task="video", meta={"pictures": pictures, "fps": fps})
    times = []
    for frame in range(2 * len(pictures)):
        times.append(start + frame / fps)
        name = f"vid0.{frame:03d}.png"
        draft.media[name] = drawer.png(((pictures[frame // 2],),))
    clip: list[Element] = [Video(tuple(draft.media), tuple(times), CELL, CELL)]

    asked = drawer.random.sample(range(len(pictures)), 2 if training else 1)
    draft.meta["asked"] = asked
    for pair in asked:
        moment = Time((times[2 * pair] + times[2 * pair + 1]) / 2)
        question: list[Element] = [Text("Which digit is shown at "), moment, Text("?")]
        answer: list[Element] = [moment, Text(f": {drawer.digit(pictures[pair])}")]
        draft.messages += _turn([*clip, *question], answer)
        clip = []
    return draft


def documents(drawer: Drawer, training: bool) -> DemoDraft:
    """Make a long document of 8 to 24 pages, and ask which digit is on one page."""
    pictures = drawer.pictures(drawer.random.randrange(8, 25))
    asked = drawer.random.sample(range(len(pictures)), 4 if training else 1)
    draft = DemoDraft(task="needle", meta={"pictures": pictures, "asked": asked})
    pages: list[Element] = []
    for page, number in enumerate(pictures, start=1):
        heading = f"Page {page}:" if page == 1 else f"\nPage {page}:"
        pages += [Text(heading), drawer.image(draft, ((number,),))]
    pages.append(Text("\n"))

    for index in asked:
        question = Text(f"Which digit is on page {index + 1}?")
        answer = Text(f"Page {index + 1}: {drawer.digit(pictures[index])}")
        draft.messages += _turn([*pages, question], [answer])
        pages = []
    return draft


def sums(drawer: Drawer, training: bool) -> DemoDraft:
    """Draw a picture of two or three digits, and write their sum step by step, and the answer."""
    pictures = drawer.pictures(drawer.random.choice((2, 3)))
    steps, total = sum_steps([int(drawer.digit(number)) for number in pictures])
    draft = DemoDraft(task="reasoning", meta={"pictures": pictures})
    image = drawer.image(draft, (tuple(pictures),))
    question: list[Element] = [image, Text("What is the sum of the digits?")]
    draft.messages = _turn(question, [Think(steps), Text(str(total))])
    return draft


def sum_steps(values: Sequence[int]) -> tuple[str, int]:
    """Write the additions from left to right, as one sentence each, and the total."""
    steps, total = list[str](), values[0]
    for value in values[1:]:
        steps.append(f"{total} + {value} = {total + value}.")
        total += value
    return " ".join(steps), total


@dataclass(frozen=True)
class Recipe:
    """How one dataset is made: its maker and the number of samples in each split."""

    make: Callable[[Drawer, bool], DemoDraft]
    train: int
    test: int


RECIPES: Final[dict[str, Recipe]] = {
    "captions": Recipe(captions, 4000, 256),
    "text": Recipe(text, 4000, 256),
    "vqa": Recipe(vqa, 10000, 512),
    "grounding": Recipe(grounding, 3000, 256),
    "interleaved": Recipe(interleaved, 1500, 256),
    "video": Recipe(video, 3000, 256),
    "documents": Recipe(documents, 800, 256),
    "sums": Recipe(sums, 3000, 256),
}
