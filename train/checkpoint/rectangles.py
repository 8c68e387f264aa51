"""Rectangles of tensors: what a stretch of a flattened tensor is made of, and whether rectangles are apart. Imports no torch."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
"""A part of a tensor: where it begins in each dim, and its sizes."""
MOST_ROUNDS: Final = 64
"""Times that rectangles are divided into groups before they count as no cut of a tensor; slices of the largest model take 5."""
MOST_IRREGULAR: Final = 1000
"""Rectangles that are compared pair by pair where no cut divides them."""


def rectangles(shape: Sequence[int], begin: int, end: int) -> Iterator[Rectangle]:
    """Yield the rectangles that numbers `begin` to `end` of a flattened tensor make up, in their order.

    Whole rows are one rectangle; a row that is cut at either end is divided in the same way. So a matrix has at most three of
    them, and a tensor of n dims at most 2n - 1.
    """
    if begin >= end:
        return
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return

    inner = shape[1:]
    row_size = math.prod(inner)
    first, skipped = divmod(begin, row_size)
    last, taken = divmod(end, row_size)
    if first == last:
        yield from _of_row(first, inner, skipped, taken)
        return

    if skipped:
        yield from _of_row(first, inner, skipped, row_size)
        first += 1
    if first < last:
        yield (first, *(0 for _ in inner)), (last - first, *inner)
    yield from _of_row(last, inner, 0, taken)


def _of_row(row: int, inner: Sequence[int], begin: int, end: int) -> Iterator[Rectangle]:
    """Yield the rectangles of a part of one row."""
    for offsets, sizes in rectangles(inner, begin, end):
        yield (row, *offsets), (1, *sizes)


def are_apart(boxes: list[Rectangle]) -> bool:
    """Return whether no two rectangles share numbers, in time that hardly grows faster than their number.

    Raises:
        ValueError: if they are too many for a pattern that no cuts make.
    """
    groups = [boxes]
    for _ in range(MOST_ROUNDS):
        divided: list[list[Rectangle]] = []
        for group in groups:
            divided += _divided(group)
        # One rectangle alone is apart from all others.
        left = [group for group in divided if len(group) > 1]
        # Rounds that leave as many groups with as many rectangles have divided nothing.
        before, after = sum(map(len, groups)), sum(map(len, left))
        if len(left) == len(groups) and after == before:
            break
        groups = left
    return all(_pairs_are_apart(group) for group in groups)


def _divided(boxes: list[Rectangle]) -> list[list[Rectangle]]:
    """Return the rectangles in groups that a cut through all of a dim divides; one group if none does."""
    for dim in range(len(boxes[0][0]) if boxes else 0):
        groups: list[list[Rectangle]] = []
        reached = -1
        for box in sorted(boxes, key=lambda box: box[0][dim]):
            begin, size = box[0][dim], box[1][dim]
            if begin >= reached or not groups:
                groups.append([])
            groups[-1].append(box)
            reached = max(reached, begin + size)
        if len(groups) > 1:
            return groups
    return [boxes]


def _pairs_are_apart(boxes: list[Rectangle]) -> bool:
    """Return whether no two rectangles share numbers, by comparing all pairs."""
    # Only few: their number is a stranger's.
    if len(boxes) > MOST_IRREGULAR:
        raise ValueError(f"more than {MOST_IRREGULAR} parts that no cuts make")
    return all(_is_apart(box, boxes[:place]) for place, box in enumerate(boxes))


def _is_apart(box: Rectangle, others: Iterable[Rectangle]) -> bool:
    """Return whether a rectangle shares no number with any other: in some dim their spans do not meet."""
    for other in others:
        meets = True
        for begin, size, other_begin, other_size in zip(*box, *other, strict=True):
            meets = meets and begin < other_begin + other_size and other_begin < begin + size
        if meets:
            return False
    return True
