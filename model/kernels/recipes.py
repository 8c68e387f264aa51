"""Remember how results of cheap operations are made, so that they can be made again instead of kept.

A linear layer keeps its input for the backward pass: the result of a norm or an activation, whose own input is kept as well.
Within `remembered` such operations leave a recipe; model/kept.py keeps that in the place of the tensor.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """A function that makes a tensor, bit for bit, and what it takes."""

    make: Callable[..., Tensor]
    inputs: tuple[Any, ...]
    """Tensors are without their graph."""


@dataclass
class _Book:
    """The recipes of tensors that are alive, by their storage."""

    is_open: bool = False
    recipes: dict[int, Recipe] = field(default_factory=dict)


_book = _Book()


@contextlib.contextmanager
def remembered(wanted: bool) -> Iterator[None]:
    """Let cheap operations leave their recipes inside, if wanted."""
    before, _book.is_open = _book.is_open, wanted
    try:
        yield
    finally:
        _book.is_open = before


def remember(result: Tensor, make: Callable[..., Tensor], *inputs: Any) -> None:
    """Leave the recipe of a whole contiguous result, for as long as its memory lives."""
    if not _book.is_open:
        return
    storage = result.untyped_storage()
    key = storage._cdata
    bare = tuple(each.detach() if isinstance(each, Tensor) else each for each in inputs)
    _book.recipes[key] = Recipe(make, bare)
    weakref.finalize(storage, _book.recipes.pop, key, None)


def recipe_of(tensor: Tensor) -> Recipe | None:
    """Return the recipe of the memory that a tensor is a view of, None if there is none."""
    return _book.recipes.get(tensor.untyped_storage()._cdata)
