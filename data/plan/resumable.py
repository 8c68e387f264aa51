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


def load_rows(
    path: Path,
    dtype: np.dtype[Any] | None = None,
) -> Rows | None:
    """Map the array in a file into memory; None if there is none, it was cut short, or it is no list of such rows.

    Tables lie beside datasets, which strangers made: counts below 0, which no table has, make it none of ours.
    """
    # numpy takes the header for Python, and raises whatever a damaged one leads it to
    with suppress(Exception):
        file = locate(path.parent, path.name)
        rows: Rows = np.load(file, mmap_mode="r", allow_pickle=False)
        if rows.ndim == 1 and (dtype is None or _has_counts(rows, dtype)):
            return rows
    return None


def _has_counts(rows: Rows, dtype: np.dtype[Any]) -> bool:
    """Return whether rows have the columns of a table, without a value below 0."""
    if rows.dtype != dtype:
        return False
    for name in dtype.names or ():
        values = rows[name]
        if values.dtype.kind != "u" and len(values) and int(values.min()) < 0:
            return False
    return True


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
    """The blocks of a count: in files of a folder, or held here."""

    def __init__(
        self,
        path: Path,
        items: int,
        block: int,
        work: BlockWork,
        dtype: np.dtype[Any] | None,
    ) -> None:
        self.path, self.items, self.block, self.work, self.dtype = path, items, block, work, dtype
        self.folder = path.with_name(path.name + ".parts")
        self.own: dict[int, Rows] = {}
        """Blocks worked out here: kept for a folder that cannot be written."""

    @property
    def missing(self) -> list[int]:
        """Return the first items of the blocks that no file holds yet."""
        return [start for start in self.starts if not self._part(start).exists()]

    @property
    def starts(self) -> range:
        """Return the first items of all blocks."""
        return range(0, self.items, self.block)

    def _made(self, start: int) -> Rows:
        return self.work(start, min(start + self.block, self.items))

    def alone(self, progress: Progress | None) -> Rows:
        """Work out the blocks one after the other, and take those that another rank has made."""
        # In random order: ranks that count the same array at once then seldom make the same block.
        order = random.Random().sample(self.starts, len(self.starts))
        for done, start in enumerate(order, start=1):
            if len(order) > 1 and load_rows(self.path, self.dtype) is not None:
                break
            if load_rows(self._part(start), self.dtype) is None:
                self._take(start, self._made(start))
            if progress is not None:
                progress(min(done * self.block, self.items), self.items)
        return self._join()

    def by_processes(self, processes: int, progress: Progress | None) -> Rows:
        """Work out the blocks that are missing by several processes."""
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
        # a single block is put into the final file at once
        if self.items <= self.block or not save_rows(self._part(start), rows):
            self.own[start] = rows

    def _join(self) -> Rows:
        """Put all blocks together."""
        parts = {start: self._rows(start) for start in self.starts}
        lacking = [start for start, rows in parts.items() if rows is None]
        joined = load_rows(self.path, self.dtype) if lacking else None
        if joined is not None:  # another rank was first, and removed the blocks
            shutil.rmtree(self.folder, ignore_errors=True)
            return joined
        for start in lacking:  # damaged
            parts[start] = self._made(start)

        return self._keep(np.concatenate([part for part in parts.values() if part is not None]))

    def _keep(self, rows: Rows) -> Rows:
        """Keep the whole array in place of its blocks, and return it."""
        if not save_rows(self.path, rows):
            return rows
        shutil.rmtree(self.folder, ignore_errors=True)
        # from the file, so that processes of a machine share its memory
        kept = load_rows(self.path, self.dtype)
        return rows if kept is None else kept

    def _rows(self, start: int) -> Rows | None:
        return self.own[start] if start in self.own else load_rows(self._part(start), self.dtype)


def _rows_of_block(work: BlockWork, block: int, items: int, start: int) -> Rows:
    """Work out a block by its first item: at module level, so that other processes can be sent it."""
    return work(start, min(start + block, items))
