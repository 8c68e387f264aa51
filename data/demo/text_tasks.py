"""The demo's samples without pictures: what the language model learns before it is asked the same of pictures."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from visionloom.data.demo.drawing import LETTERS, NAMES, DemoDraft, Drawer, turn_of
from visionloom.data.shards.sample import Element, Text, Think, Time

CHAINS: Final = 5
"""Sums that a document of sums has."""


def text(drawer: Drawer, training: bool) -> DemoDraft:
    """Write sums, as chains of additions or with the question for one, and names of digits."""
    (make,) = drawer.random.choices((_sum, _sums, _names), weights=(1, 4, 1))
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


def _names(draws: random.Random) -> DemoDraft:
    values = draws.sample(range(10), 4)
    names = [f"{NAMES[value]} is {value}" for value in values]
    return DemoDraft(content=[Text(". ".join(names))])


def lists(drawer: Drawer, training: bool) -> DemoDraft:
    """Write a list of pages with a digit each, and again: what long documents ask of pictures."""
    draws = drawer.random
    letters = draws.sample(LETTERS, _length(draws))
    names = [Text(f"Page {letter}") for letter in letters]
    # To foresee that a page is named again, its value must learn what stands before it: half of a lookup.
    return _lookup(draws, names, [Text(f" {letter}") for letter in letters])


def moments(drawer: Drawer, training: bool) -> DemoDraft:
    """Write a list of moments with a digit each, and again: what videos ask of pictures."""
    draws = drawer.random
    start, step = draws.randrange(4) + 0.5, draws.choice((1, 2))
    names = [Time(start + place * step) for place in range(_length(draws))]
    # the second again, without its half
    return _lookup(draws, names, [Text(f" {int(name.seconds)}") for name in names])


def _length(draws: random.Random) -> int:
    """Draw the length of a list: looking up is learned among few names, and is the same among many."""
    return draws.randrange(2, 5)


def _lookup(
    draws: random.Random, names: Sequence[Text | Time], endings: Sequence[Element]
) -> DemoDraft:
    """Write names with a digit each as a list, in which an ending may follow, and again in another order."""
    digits = [Text(str(value)) for value in draws.choices(range(10), k=len(names))]
    content: list[Element] = []
    for place, name in enumerate(names):
        content += [replace(name, loss=0.0), replace(digits[place], loss=0.0)]
        content += endings[place : place + 1]
        content.append(Text("\n", loss=0.0))
    for place in draws.sample(range(len(names)), len(names)):
        content += [replace(names[place], loss=0.0), digits[place], Text("\n", loss=0.0)]
    return DemoDraft(content=content)
