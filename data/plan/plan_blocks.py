"""Blocks of a plan: packs as flat arrays, made once, kept on disk for the other processes of a machine, made ahead."""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.common.atomic import replacing

_KEPT: Final = 4
"""Blocks that a process holds."""
_ON_DISK: Final = 16
"""Blocks kept in the folder (2 MB each at most): what a restart from an older checkpoint lacks is made again."""


@dataclass(frozen=True, slots=True)
class PlanBlock:
    """n samples in p packs, in stream order."""

    borders: NDArray[np.int32]
    """[p + 1] where each pack's samples begin."""
    entries: NDArray[np.int16]
    """[n] number of the dataset."""
    samples: NDArray[np.uint32]
    """[n] index in the dataset."""
    part_numbers: NDArray[np.uint16]
    """[n] which of the sample's parts."""
    draws: NDArray[np.uint32]
    """[n] which draw of the block brought it."""
    tokens: NDArray[np.int32]
    """[n]"""
    patches: NDArray[np.int32]
    """[n]"""
    patch_pairs: NDArray[np.int64]
    """[n] sum of the squared patch counts of its pictures and frames."""

    def __len__(self) -> int:
        return len(self.borders) - 1

    def places(self, pack: int) -> tuple[tuple[int, int, int], ...]:
        """Return (dataset number, sample index, part) of each sample of a pack."""
        here = slice(self.borders[pack], self.borders[pack + 1])
        entries, samples = self.entries[here].tolist(), self.samples[here].tolist()
        return tuple(zip(entries, samples, self.part_numbers[here].tolist(), strict=True))

    def sample_work(self) -> NDArray[np.int64]:
        """Count the work of each sample [n, 4], as `work_of` does."""
        return work_of(self.tokens, self.patches, self.patch_pairs)

    def work(self) -> NDArray[np.int64]:
        """Count the work of each pack [p, 4], as `work_of` does."""
        each = self.sample_work()
        # reduceat cannot take an empty array
        return np.add.reduceat(each, self.borders[:-1], axis=0) if len(each) else each

    def excerpt(self, start: int, stop: int) -> "PlanBlock":
        """Return some of the packs, from one up to another."""
        here = slice(self.borders[start], self.borders[stop])
        arrays = {name: getattr(self, name)[here] for name in _BY_SAMPLE}
        return PlanBlock(self.borders[start : stop + 1] - self.borders[start], **arrays)

    def regrouped(self, packs: list[list[int]]) -> "PlanBlock":
        """Return packs of these samples, each named by its place here."""
        order = np.array([sample for pack in packs for sample in pack], np.int64)
        borders = np.cumsum([0, *map(len, packs)]).astype(np.int32)
        return PlanBlock(borders, **{name: getattr(self, name)[order] for name in _BY_SAMPLE})


_BY_SAMPLE: Final = [item.name for item in fields(PlanBlock) if item.name != "borders"]


def work_of(
    tokens: NDArray[np.int32], patches: NDArray[np.int32], patch_pairs: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return int64 [n, 4] of n samples: tokens, squared tokens, patches, sum of squared patch counts of frames."""
    lengths, counts = tokens.astype(np.int64), patches.astype(np.int64)
    return np.stack([lengths, lengths**2, counts, patch_pairs], axis=1)


def joined(blocks: list[PlanBlock]) -> PlanBlock:
    """Return the packs of one block after the other."""
    sizes = np.concatenate([np.diff(block.borders) for block in blocks])
    borders = np.cumsum([0, *sizes]).astype(np.int32)
    arrays = {}
    for name in _BY_SAMPLE:
        arrays[name] = np.concatenate([getattr(block, name) for block in blocks])
    return PlanBlock(borders, **arrays)


class PlanBlockStore:
    """Blocks by number: held, being made, on disk, or made now. Which of these never changes what is in them."""

    def __init__(
        self,
        make: Callable[[int], PlanBlock],
        folder: Path | None,
    ) -> None:
        """`folder` keeps one file a block; None or one that cannot be written: only this process has them."""
        self._make, self._folder = make, folder
        self._held: dict[int, Future[PlanBlock]] = {}
        self._maker: ThreadPoolExecutor | None = None

    def get(self, number: int) -> PlanBlock:
        """Return a block, waiting for it if it is being made."""
        if number not in self._held:
            self._held[number] = Future()
            try:
                self._held[number].set_result(self._load_or_make(number))
            # a block that failed is tried again, it must not be waited for
            except BaseException:
                del self._held[number]
                raise
            self._trim()
        return self._held[number].result()

    def ahead(self, number: int) -> None:
        """Have a block made in the background, so that nobody waits for it later."""
        if number in self._held:
            return
        if self._maker is None:
            # one: blocks are needed in order
            self._maker = ThreadPoolExecutor(1, "visionloom-plan")
        self._held[number] = self._maker.submit(self._load_or_make, number)
        self._trim()

    def _trim(self) -> None:
        # the first that was asked for goes: steps only go forward
        for earliest in list(self._held)[:-_KEPT]:
            del self._held[earliest]

    def holds(self, number: int) -> bool:
        """Return whether a block is in memory or being made."""
        return number in self._held

    def _load_or_make(self, number: int) -> PlanBlock:
        if self._folder is None:
            return self._make(number)
        path = self._folder / f"{number:06d}.npz"
        block = load_block(path)
        if block is None:
            block = self._make(number)
            # a folder that cannot be written is no fault: the block is then only not kept
            with suppress(OSError):
                save_block(path, block)
                (self._folder / f"{number - _ON_DISK:06d}.npz").unlink(missing_ok=True)
        return block


def load_block(path: Path) -> PlanBlock | None:
    """Read a block from its file; None if there is none, it was cut short, or it has other arrays."""
    try:
        with np.load(path) as file:
            return PlanBlock(**{item.name: file[item.name] for item in fields(PlanBlock)})
    except Exception:  # zipfile, numpy and the file system each have errors of their own for a damaged file: it is made again
        return None


def save_block(path: Path, block: PlanBlock) -> None:
    """Write a block whole or not at all; raises OSError where that is not allowed."""
    content, arrays = io.BytesIO(), dict[str, Any]()
    for item in fields(PlanBlock):
        arrays[item.name] = getattr(block, item.name)
    np.savez(content, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(content.getbuffer())
