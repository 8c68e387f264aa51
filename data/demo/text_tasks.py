"""The demo's samples without pictures: what the language model learns before it is asked the same of pictures."""

import random
from collections.abc import Sequence
from typing import Final

from visionloom.data.demo.drawing import NAMES, DemoDraft, Drawer, Entries, ask, turn_of
from visionloom.data.shards.sample import Element, Text, Think, Time

CHAINS: Final = 5
"""Sums that a document of sums has."""


def text(drawer: Drawer, training: bool) -> DemoDraft:
    """Write text only: sums, copies, names of digits, and, most often, looking up a page or a moment."""
    makers = (_sum, _sums, _copy, _names, _pages, _moments)
    # Looking up prepares for long documents and videos, which ask the same of pictures.
    (make,) = drawer.random.choices(makers, weights=(1, 4, 1, 1, 6, 6))
    return make(drawer.random)


def sum_steps(values: Sequence[int]) -> tuple[str, int]:
    """Write the additions from left to right, as one sentence each, and the total."""
    steps, total = list[str](), values[0]
    for value in values[1:]:
        steps.append(f"{total} + {value} = {total + value}.")
        total += value
    return " ".join(steps), total


def _sum(draws: random.Random) -> DemoDraft:
    values = draws.choices(range(10), k=draws.choice((2, 3)))
    steps, total = sum_steps(values)
    question = f"What is {' + '.join(map(str, values))}?"
    return DemoDraft(messages=turn_of([Text(question)], [Think(steps), Text(str(total))]))


def _sums(draws: random.Random) -> DemoDraft:
    """Write sums one after the other, supervised at the results alone: twice as many additions as with questions."""
    content: list[Element] = []
    for _ in range(CHAINS):
        total, *values = draws.choices(range(10), k=3)
        for value in values:
            # Operands are drawn: to predict them is to learn noise.
            content.append(Text(f"{total} + {value} =", loss=0.0))
            total += value
            content += [Text(f" {total}."), Text(" ", loss=0.0)]
        content.append(Text("\n", loss=0.0))
    return DemoDraft(content=content)


def _copy(draws: random.Random) -> DemoDraft:
    """Write digits and the same again: the first step to looking something up."""
    count = draws.randrange(8, 20)
    digits = " ".join(_digits(draws, count))
    # The first time nobody can foresee them.
    first = Text(f"Digits: {digits}\n", loss=0.0)
    return DemoDraft(content=[first, Text(f"Again: {digits}")])


def _names(draws: random.Random) -> DemoDraft:
    values = draws.sample(range(10), 4)
    names = [f"{NAMES[value]} is {value}" for value in values]
    return DemoDraft(content=[Text(". ".join(names))])


def _pages(draws: random.Random) -> DemoDraft:
    count = _length(draws)
    first = draws.randrange(1, 15)
    numbers = range(first, first + count)

    def question(place: int) -> list[Element]:
        return [Text(f"Which digit is on page {numbers[place]}?")]

    names = [[Text(f"Page {number}")] for number in numbers]
    return _lookup(draws, Entries(names, _digits(draws, len(names)), question))


def _moments(draws: random.Random) -> DemoDraft:
    start, step = draws.randrange(4) + 0.5, draws.choice((1, 2))
    moments = [Time(start + place * step) for place in range(min(6, _length(draws)))]

    def question(place: int) -> list[Element]:
        return [Text("Which digit is shown at "), moments[place], Text("?")]

    names = [[moment] for moment in moments]
    return _lookup(draws, Entries(names, _digits(draws, len(names)), question))


def _length(draws: random.Random) -> int:
    """Draw the length of a list, most often a short one: there looking up begins, among few names."""
    # Most documents of the test have more pages than any list: these are for the first steps.
    longest = draws.choices((4, 8, 12), weights=(6, 2, 1))[0]
    return draws.randrange(2, longest + 1)


def _digits(draws: random.Random, count: int) -> list[str]:
    return [str(value) for value in draws.choices(range(10), k=count)]


def _lookup(draws: random.Random, entries: Entries) -> DemoDraft:
    """Write the entries as a list, and ask for them."""
    opening: list[Element] = []
    for place in range(len(entries.values)):
        opening += [*entries.answer(place), Text("\n")]
    return DemoDraft(messages=ask(draws, entries, opening, training=True))
