"""The samples of the demo: ten datasets composed from handwritten digits, every phase of training in miniature.

Each maker takes a `Drawer` (seeded draws and pictures) and returns a draft: the sample's parts and its media. The
`meta` of a sample holds the numbers of its handwriting pictures, so that every answer can be checked. In training
one picture, video or document has several questions: it is encoded once, and each answer is a supervised look at it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from visionloom.data.demo.drawing import (
    CELL,
    GRIDS,
    LETTERS,
    PLACES,
    DemoDraft,
    DigitGrid,
    Drawer,
    Entries,
    ask,
    grid_of,
    turn_of,
)
from visionloom.data.demo.text_tasks import lists, moments, sum_steps, text
from visionloom.data.shards.sample import Box, Element, Image, Message, Text, Think, Time, Video

PLACED: Final = 0.6
"""Share of the captions that name places."""
ALONE: Final = 0.4
"""Share of the canvases of training with a single digit: where it is, is learned before which of several it is."""


def captions(drawer: Drawer, training: bool) -> DemoDraft:
    """Draw digits and say what the picture shows: all of a grid in rows, or the place of each on a canvas."""
    return _places(drawer) if drawer.random.random() < PLACED else _rows(drawer)


def _rows(drawer: Drawer) -> DemoDraft:
    """Say which digits a grid has, row by row."""
    rows, columns = drawer.random.choice((*GRIDS, (1, 3)))
    pictures = drawer.pictures(rows * columns)
    draft = DemoDraft(meta={"pictures": pictures, "columns": columns})
    digits = [*map(drawer.digit, pictures)]
    lines = [" ".join(digits[row * columns :][:columns]) for row in range(rows)]
    image = drawer.image(draft, grid_of(pictures, columns))
    draft.content = [image, Text(f"\nThe image shows: {' / '.join(lines)}")]
    return draft


def _places(drawer: Drawer) -> DemoDraft:
    """Say of each digit on a canvas where it is: a look for what is shown, as a box asks for, in few tokens."""
    side, pictures, cells = _scattered(drawer, ALONE)
    draft = DemoDraft(meta={"pictures": pictures, "cells": cells, "columns": side})
    draft.content = [drawer.image(draft, _canvas(side, pictures, cells))]
    for number, cell in zip(pictures, cells, strict=True):
        # Which digit comes next cannot be foreseen: only its place is learned.
        draft.content.append(Text(f"\n{drawer.digit(number)}", loss=0.0))
        draft.content.append(Text(f" {PLACES[side, side][cell]}"))
    return draft


def _scattered(drawer: Drawer, alone: float) -> tuple[int, list[int], list[int]]:
    """Draw the side of a canvas, distinct digits, and the cell of each; `alone`: the share of canvases with one digit."""
    side = drawer.random.choice((2, 3))
    count = drawer.random.randrange(2, side + 2) if drawer.random.random() >= alone else 1
    pictures = drawer.pictures(count, distinct=True)
    return side, pictures, drawer.random.sample(range(side * side), len(pictures))


def _canvas(side: int, pictures: list[int], cells: list[int]) -> DigitGrid:
    placed: list[int | None] = [None] * (side * side)
    for cell, number in zip(cells, pictures, strict=True):
        placed[cell] = number
    return grid_of(placed, side)


def vqa(drawer: Drawer, training: bool) -> DemoDraft:
    """Ask for one digit, or for the digit at a place of a 1 x 2 or 2 x 2 grid; for two of them in training."""
    ((rows, columns),) = drawer.random.choices(GRIDS, weights=(3, 3, 4))
    pictures = drawer.pictures(rows * columns)
    draft = DemoDraft(meta={"pictures": pictures, "columns": columns})
    image = drawer.image(draft, grid_of(pictures, columns))
    if len(pictures) == 1:
        draft.task = "read"
        answer = drawer.digit(pictures[0])
        draft.messages = turn_of([image, Text("Which digit is this?")], [Text(answer)])
        return draft

    draft.task = "position"
    asked = drawer.random.sample(range(len(pictures)), 2 if training else 1)
    draft.meta["asked"] = asked
    opening: list[Element] = [image]
    for index in asked:
        question = Text(f"Which digit is at the {PLACES[rows, columns][index]}?")
        draft.messages += turn_of([*opening, question], [Text(drawer.digit(pictures[index]))])
        opening = []
    return draft


def grounding(drawer: Drawer, training: bool) -> DemoDraft:
    """Ask where one of several distinct digits lies on a canvas of 64 or 96 pixels; for all of them in training."""
    side, pictures, cells = _scattered(drawer, ALONE if training else 0.0)
    asked = drawer.random.sample(range(len(pictures)), len(pictures) if training else 1)
    meta = {"pictures": pictures, "cells": cells, "columns": side, "asked": asked}
    draft = DemoDraft(task="grounding", meta=meta)
    opening: list[Element] = [drawer.image(draft, _canvas(side, pictures, cells))]
    for index in asked:
        digit = drawer.digit(pictures[index])
        row, column = divmod(cells[index], side)
        left, top = column * CELL, row * CELL
        box = Box(0, (left, top, left + CELL, top + CELL), "px", digit)
        place = Text(f"{digit} {PLACES[side, side][cells[index]]}\n")
        draft.messages += turn_of([*opening, Text(f"Where is the {digit}?")], [place, box])
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

    moments = []
    for pair in range(len(pictures)):
        moments.append(Time((times[2 * pair] + times[2 * pair + 1]) / 2))

    def question(place: int) -> list[Element]:
        return [Text("Which digit is shown at "), moments[place], Text("?")]

    digits = [drawer.digit(number) for number in pictures]
    entries = Entries([[moment] for moment in moments], digits, question)
    draft.messages = ask(drawer.random, entries, clip, training)
    draft.meta["depth"] = asked_depth(draft.messages, entries)
    return draft


def documents(drawer: Drawer, training: bool) -> DemoDraft:
    """Make a long document of 8 to 24 pages, in training also shorter ones, and ask which digit is on one page."""
    pictures = drawer.pictures(drawer.random.randrange(4 if training else 8, 25))
    draft = DemoDraft(task="needle", meta={"pictures": pictures})
    letters = LETTERS[: len(pictures)]
    names = [[Text(f"Page {letter}")] for letter in letters]
    pages: list[Element] = []
    for letter, number in zip(letters, pictures, strict=True):
        pages += _page(letter, drawer.image(draft, ((number,),)))

    def question(place: int) -> list[Element]:
        return [Text(f"Which digit is on page {letters[place]}?")]

    digits = [drawer.digit(number) for number in pictures]
    entries = Entries(names, digits, question)
    draft.messages = ask(drawer.random, entries, pages, training)
    draft.meta["depth"] = asked_depth(draft.messages, entries)
    return draft


def _page(letter: str, image: Image) -> list[Element]:
    """Return a picture between its page's names, of which the second is learned, as in a list."""
    again = Text(f" {letter}", loss=1.0)
    return [Text(f"Page {letter}"), image, again, Text("\n")]


def asked_depth(messages: Sequence[Message], entries: Entries) -> float:
    """Return how deep the entry of the first question is, from 0 to 1."""
    answers = [tuple(entries.answer(place)) for place in range(len(entries.values))]
    return answers.index(messages[1].content) / max(1, len(answers) - 1)


def sums(drawer: Drawer, training: bool) -> DemoDraft:
    """Draw a picture of two or three digits, and write their sum step by step, and the answer."""
    pictures = drawer.pictures(drawer.random.choice((2, 3)))
    steps, total = sum_steps([int(drawer.digit(number)) for number in pictures])
    draft = DemoDraft(task="reasoning", meta={"pictures": pictures})
    image = drawer.image(draft, (tuple(pictures),))
    question: list[Element] = [image, Text("What is the sum of the digits?")]
    draft.messages = turn_of(question, [Think(steps), Text(str(total))])
    return draft


@dataclass(frozen=True)
class Recipe:
    """How one dataset is made: its maker and the number of samples to train on, and in each of the other splits."""

    make: Callable[[Drawer, bool], DemoDraft]
    train: int
    held_out: int

    def samples(self, split: str) -> int:
        """Return the number of samples of a split."""
        return self.train if split == "train" else self.held_out


RECIPES: Final[dict[str, Recipe]] = {
    "captions": Recipe(captions, 8000, 256),
    "text": Recipe(text, 4000, 256),
    "lists": Recipe(lists, 8000, 256),
    "moments": Recipe(moments, 4000, 256),
    "vqa": Recipe(vqa, 4000, 512),
    "grounding": Recipe(grounding, 4000, 256),
    "interleaved": Recipe(interleaved, 1500, 256),
    "video": Recipe(video, 4000, 256),
    "documents": Recipe(documents, 2000, 256),
    "sums": Recipe(sums, 3000, 256),
}
