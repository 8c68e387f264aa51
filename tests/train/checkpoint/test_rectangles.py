"""Stretches of flattened tensors as rectangles, and rectangles that are apart. Reference: numpy and brute force."""

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from visionloom.train.checkpoint.rectangles import (
    MOST_IRREGULAR,
    Rectangle,
    are_apart,
    rectangles,
)

SHAPES = [(7,), (3, 5), (4, 1), (2, 3, 4), (1, 4, 3), (3, 2, 2, 4), (2, 1, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_stretch_is_its_rectangles_in_order(shape: tuple[int, ...]) -> None:
    """Every stretch of each shape, number by number."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for begin in range(numbers.size):
        for end in range(begin, numbers.size + 1):
            made = list(rectangles(shape, begin, end))
            taken = [numbers[region(box)].ravel() for box in made]
            expected = np.arange(begin, end)
            assert np.array_equal(np.concatenate([expected[:0], *taken]), expected)
            assert len(made) <= 2 * len(shape) - 1


def region(box: Rectangle) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(*box, strict=True))


def test_the_most_rectangles_of_a_stretch() -> None:
    assert [len(list(rectangles((9,) * dims, 1, 9**dims - 1))) for dims in (1, 2, 3, 4)] == [
        1,
        3,
        5,
        7,
    ]


def test_random_rectangles_are_apart_or_not() -> None:
    """Few and small ones, so that both answers are frequent."""
    draw = random.Random(0)
    answers = []
    for _ in range(2000):
        boxes = []
        for _ in range(draw.randint(0, 5)):
            offsets = tuple(draw.randint(0, 4) for _ in range(3))
            sizes = tuple(draw.randint(1, 3) for _ in range(3))
            boxes.append((offsets, sizes))
        count = np.zeros((8, 8, 8), int)
        for box in boxes:
            count[region(box)] += 1
        answers.append(bool(count.max() <= 1))
        assert are_apart(boxes) == answers[-1], boxes
    assert 200 < sum(answers) < 1800


def slices_of_ranks(layers: int, rows: int, columns: int, data_ranks: int) -> list[Rectangle]:
    """A stacked matrix cut over two tensor ranks by columns; data ranks have stretches of each half, over all layers."""
    boxes: list[Rectangle] = []
    half = columns // 2
    numbers = layers * rows * half
    for tensor_rank in range(2):
        ends = [numbers * rank // data_ranks for rank in range(data_ranks + 1)]
        for begin, end in pairwise(ends):
            for (layer, row, column), sizes in rectangles((layers, rows, half), begin, end):
                boxes.append(((layer, row, column + tensor_rank * half), sizes))
    return boxes


def test_slices_of_many_ranks_are_apart() -> None:
    """1,536 data-parallel ranks: too many to compare in pairs, and one more is found."""
    boxes = slices_of_ranks(94, 96, 64, 1536)
    assert len(boxes) > 5 * MOST_IRREGULAR
    random.Random(1).shuffle(boxes)
    assert are_apart(boxes)
    assert not are_apart([*boxes, ((40, 50, 20), (1, 1, 1))])


def test_a_strangers_pattern_costs_no_time() -> None:
    """Rings around rings, which no cut divides: many are refused before they are compared."""
    rings: list[Rectangle] = []
    for ring in range(MOST_IRREGULAR // 4 + 1):
        side = 2 * (MOST_IRREGULAR - ring)
        rings += [
            ((ring, ring), (1, side - 1)),
            ((ring, ring + side - 1), (side - 1, 1)),
            ((ring + side - 1, ring + 1), (1, side - 1)),
            ((ring + 1, ring), (side - 1, 1)),
        ]
    with pytest.raises(ValueError, match="no cuts make"):
        are_apart(rings)
