"""Long counts over a dataset, done in blocks: by several processes, resumed where they were cut off, kept as one array.

Every finished block is a file of its own beside the final one, so a process that starts again, or one of another rank that
needs the same array, takes what is there. A folder that cannot be written is no fault: the result is then only not kept.
"""

import functools
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.common.atomic import replacing
from visionloom.common.places import locate
from visionloom.common.processes import as_finished
from visionloom.common.progress import Progress, ProgressOf

Rows = NDArray[Any]
BlockWork = Callable[[int, int], Rows]
"""Return the rows of the items start .. stop; picklable."""


@dataclass(frozen=True)
class CountingHelp:
    """Who works on a long count in addition to this process, and what hears of its progress."""

    processes: int = 0
    """Started for the count; 0: this one counts alone."""
    report: ProgressOf | None = None
    """Returns the progress callback for a named piece of counting."""
    name: str = ""
    """Of this piece of counting."""

    def named(self, name: str) -> "CountingHelp":
        """Return the same help for a piece of counting."""
        return replace(self, name=name)

    @property
    def progress(self) -> Progress | None:
        """Return the progress callback."""
        return self.report(self.name) if self.report else None


NO_HELP: Final = CountingHelp()
"""No other process, and no report."""


def in_blocks(
    path: Path,
    items: int,
    block: int,
    work: BlockWork,
    dtype: np.dtype[Any] | None = None,
    helpers: CountingHelp = NO_HELP,
) -> Rows:
    """Return the rows of all items, read from `path` or worked out block by block and put there.

    Args:
        path: an .npy file; its blocks lie in a folder of the same name with .parts until all are there.
        items: how many there are.
        block: items worked out at a time.
        work: gives the rows of a block; what it raises ends the count, finished blocks are kept.
        dtype: of the rows; None: any.
        helpers: that work in addition to this process, and hear of each block.
    """
    blocks = _Blocks(path, items, block, work, dtype)
    if helpers.processes and len(blocks.missing) > 1:
        return blocks.by_processes(helpers.processes, helpers.progress)
    return blocks.alone(helpers.progress)


def load_rows(path: Path, dtype: np.dtype[Any] | None = None) -> Rows | None:
    """The array in a file, mapped into memory; None if there is none, it was cut short, or it is no list of such rows.

    Tables lie beside datasets, which strangers made: counts below 0, which no table has, make it none of ours.
    """
    with suppress(
        Exception
    ):  # numpy takes the header for Python, and raises whatever a damaged one leads it to
        rows: Rows = np.load(locate(path.parent, path.name), mmap_mode="r", allow_pickle=False)
        if rows.ndim == 1 and (
            dtype is None
            or (rows.dtype == dtype and all(_counts(rows[name]) for name in dtype.names or ()))
        ):
            return rows
    return None


def _counts(values: Rows) -> bool:
    return values.dtype.kind == "u" or len(values) == 0 or int(values.min()) >= 0


def save_rows(path: Path, rows: Rows) -> bool:
    """Keep an array whole or not at all; False where the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.save(file, rows)
    except OSError:
        return False
    return True


class _Blocks:
    def __init__(
        self, path: Path, items: int, block: int, work: BlockWork, dtype: np.dtype[Any] | None
    ) -> None:
        self.path, self.items, self.block, self.work, self.dtype = path, items, block, work, dtype
        self.folder = path.with_name(path.name + ".parts")
        self.own: dict[int, Rows] = {}
        """Blocks worked out here: kept for a folder that cannot be written."""

    @property
    def missing(self) -> list[int]:
        """First items of the blocks that no file holds yet."""
        return [
            start for start in range(0, self.items, self.block) if not self._part(start).exists()
        ]

    def alone(self, progress: Progress | None) -> Rows:
        """Ranks that count the same array go through its blocks in random orders and take each other's."""
        starts = list(range(0, self.items, self.block))
        for done, start in enumerate(random.Random().sample(starts, len(starts)), start=1):
            if len(starts) > 1 and load_rows(self.path, self.dtype) is not None:
                break
            if load_rows(self._part(start), self.dtype) is None:
                self._take(start, self.work(start, min(start + self.block, self.items)))
            if progress is not None:
                progress(min(done * self.block, self.items), self.items)
        return self._join()

    def by_processes(self, processes: int, progress: Progress | None) -> Rows:
        missing = self.missing
        done = self.items - len(missing) * self.block
        work = functools.partial(_rows_of_block, self.work, self.block, self.items)

        for start, rows in as_finished(work, missing, processes):
            self._take(start, rows)
            done = min(done + self.block, self.items)
            if progress is not None:
                progress(max(done, 0), self.items)
        return self._join()

    def _part(self, start: int) -> Path:
        return self.folder / f"{start:012d}.npy"

    def _take(self, start: int, rows: Rows) -> None:
        if self.items <= self.block or not save_rows(self._part(start), rows):
            self.own[start] = rows

    def _join(self) -> Rows:
        parts = {start: self._rows(start) for start in range(0, self.items, self.block)}
        lacking = [start for start, rows in parts.items() if rows is None]
        if (
            lacking and (joined := load_rows(self.path, self.dtype)) is not None
        ):  # another rank was first, and removed the blocks
            shutil.rmtree(self.folder, ignore_errors=True)
            return joined
        for start in lacking:  # damaged
            parts[start] = self.work(start, min(start + self.block, self.items))
        rows = np.concatenate([found for found in parts.values() if found is not None])
        if save_rows(self.path, rows):
            shutil.rmtree(self.folder, ignore_errors=True)
            return rows if (kept := load_rows(self.path, self.dtype)) is None else kept
        return rows

    def _rows(self, start: int) -> Rows | None:
        return self.own[start] if start in self.own else load_rows(self._part(start), self.dtype)


def _rows_of_block(work: BlockWork, block: int, items: int, start: int) -> Rows:
    return work(start, min(start + block, items))
