"""`data.py stats DIR`: samples, media and tasks of every dataset below a folder."""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from visionloom.parallel.errors import UserError

if TYPE_CHECKING:
    from visionloom.data.shards import Dataset


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser("stats", help="count samples, media and tasks of every dataset below a folder")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.set_defaults(run=run)


@dataclass
class _Counts:
    """What one dataset holds."""

    samples: int = 0
    images: int = 0
    videos: int = 0
    frames: int = 0
    tasks: Counter[str] = field(default_factory=Counter)


def run(options: argparse.Namespace) -> None:
    """Print a table with a row for each dataset."""
    from rich.console import Console
    from rich.table import Table

    from visionloom.data.shards import MANIFEST, Dataset

    folders = sorted(path.parent for path in options.folder.rglob(MANIFEST))
    if not folders:
        raise UserError(f"no {MANIFEST} in or below {options.folder}: run python launch/data.py index DIR")
    table = Table("dataset", "samples", "MiB", "images", "videos", "frames", "tasks")
    for folder in folders:
        dataset = Dataset.open(folder, folder.name)
        counts = _count(dataset)
        mebibytes = sum(shard.bytes for shard in dataset.shards) / 2**20
        numbers = [f"{number:,}" for number in (counts.images, counts.videos, counts.frames)]
        tasks = ", ".join(f"{task} {number:,}" for task, number in sorted(counts.tasks.items()))
        name = str(folder.relative_to(options.folder)) if folder != options.folder else folder.name
        table.add_row(name, f"{counts.samples:,}", f"{mebibytes:.1f}", *numbers, tasks)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _count(dataset: "Dataset") -> _Counts:
    from visionloom.data.sample import Image, Video

    counts = _Counts(samples=len(dataset))
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        counts.images += sum(isinstance(element, Image) for element in sample.elements)
        frames = [len(element.frames) for element in sample.elements if isinstance(element, Video)]
        counts.videos, counts.frames = counts.videos + len(frames), counts.frames + sum(frames)
        counts.tasks.update([sample.task] if sample.task else [])
    return counts
