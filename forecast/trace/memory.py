"""Account for the device's memory: which storages live when, and which of them at the fullest moment of a step."""

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visionloom.forecast.trace.events import AliveTensors, Category, Direction, PeakMemory
from visionloom.parallel.parts import LOSS

BLOCK = 512
"""CUDA's allocator gives memory in multiples of so many bytes."""
ORIGINS_SHOWN = 12


@dataclass(slots=True)
class LiveStorage:
    """One storage on the device."""

    bytes: int
    part: str
    direction: Direction
    name: str
    """The operation that made it."""
    slot: int
    """In which slot it was made; -1 before the step."""
    category: Category | None = None
    """Known from its owner or from a collective; None: told from its life."""
    died_in: int | None = None
    """Slot in which it was released."""
    reference: Any = None


@dataclass
class Ledger:
    """The storages that are alive, and how that changed during a step."""

    alive: dict[int, LiveStorage] = field(default_factory=dict)
    """By the address of torch's storage object."""
    bytes: int = 0
    highest: int = 0
    """Most bytes alive since the slot began."""
    changes: list[tuple[LiveStorage, int]] = field(default_factory=list)
    """LiveStorage and bytes, negative for a release, in order of time."""
    slot: int = -1
    _before: list[tuple[LiveStorage, int]] = field(default_factory=list)

    def see(self, tensor: Tensor, part: str, direction: Direction, name: str) -> None:
        """Take note of a tensor on the device that an operation returned."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        block = LiveStorage(_rounded(storage.nbytes()), part, direction, name, self.slot)
        block.reference = weakref.ref(storage, lambda _: self.release(key))
        self.alive[key] = block
        self._change(block, block.bytes)

    def release(self, key: int) -> None:
        """Take note that a storage is gone."""
        block = self.alive.pop(key, None)
        if block is not None:
            block.died_in = self.slot
            block.reference = None
            self._change(block, -block.bytes)

    def resized(self, storage: Any) -> None:
        """Take note that a storage has another size, as recomputation releases and restores an output."""
        block = self.alive.get(storage._cdata)
        if block is not None and (size := _rounded(storage.nbytes())) != block.bytes:
            change = size - block.bytes
            block.bytes = size
            self._change(block, change)

    def _change(self, block: LiveStorage, change: int) -> None:
        self.bytes += change
        self.highest = max(self.highest, self.bytes)
        self.changes.append((block, change))

    def own(self, tensors: Iterable[Tensor], category: Category) -> None:
        """Say what the storages of these tensors are for."""
        for tensor in tensors:
            block = self.alive.get(tensor.untyped_storage()._cdata)
            if block is not None and block.category is None:
                block.category = category

    def begin(self) -> dict[Category, int]:
        """Begin a step; return the bytes at rest by category."""
        self.changes.clear()
        self.highest = self.bytes
        at_rest: Counter[Category] = Counter()
        for block in self.alive.values():
            at_rest[block.category or Category.TEMPORARY] += block.bytes
        self._before = [(block, block.bytes) for block in self.alive.values()]
        return dict(at_rest)

    def next_slot(self, slot: int) -> int:
        """Begin a slot; return the most bytes that were alive in the one before."""
        highest, self.highest = self.highest, self.bytes
        self.slot = slot
        return highest

    def allocated(self) -> int:
        """Return the bytes that were taken since the step began."""
        return sum(change for _, change in self.changes if change > 0)

    def peak(self) -> PeakMemory:
        """Return the fullest moment of the step that has ended, and what was alive then."""
        now = highest = sum(size for _, size in self._before)
        moment = -1
        for number, (_, change) in enumerate(self.changes):
            now += change
            if now > highest:
                highest, moment = now, number

        blocks = {id(block): block for block, _ in self._before}
        sizes = {id(block): size for block, size in self._before}
        for block, change in self.changes[: moment + 1]:
            blocks[id(block)] = block
            sizes[id(block)] = sizes.get(id(block), 0) + change
        alive = [(blocks[key], size) for key, size in sizes.items() if size > 0]
        slot = self.changes[moment][0].slot if moment >= 0 else -1
        return _described(highest, alive, slot)


def _described(bytes_: int, alive: list[tuple[LiveStorage, int]], slot: int) -> PeakMemory:
    by_category: Counter[Category] = Counter()
    origins: dict[tuple[Category, str, str], list[int]] = defaultdict(list)
    for block, size in alive:
        category = category_of(block)
        by_category[category] += size
        origins[category, block.part, block.name].append(size)
    largest = sorted(origins.items(), key=lambda item: -sum(item[1]))[:ORIGINS_SHOWN]
    tensors = tuple(
        AliveTensors(category, part, name, sum(sizes), len(sizes))
        for (category, part, name), sizes in largest
    )
    return PeakMemory(bytes_, dict(by_category), tensors, slot)


def category_of(block: LiveStorage) -> Category:
    """Return what a block was for, told from its life where it has no owner."""
    if block.category is not None:
        return block.category
    if block.part == LOSS and block.direction != Direction.BACKWARD:
        return Category.LOGITS
    # What a forward pass made and a later pass released was kept for the backward pass.
    kept = block.direction == Direction.FORWARD and block.died_in != block.slot
    return Category.ACTIVATIONS if kept else Category.TEMPORARY


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


@contextlib.contextmanager
def heard_resizes(ledger: Ledger) -> Iterator[None]:
    """Let a ledger hear of storages that change their size, which no dispatch mode sees."""
    storage: Any = torch.UntypedStorage
    resize = storage.resize_

    def heard(resized: Any, size: int) -> Any:
        result = resize(resized, size)
        ledger.resized(resized)
        return result

    storage.resize_ = heard
    try:
        yield
    finally:
        storage.resize_ = resize
