"""Shards: make the demo's, index others, and count what is in them.

Commands:
    python launch/data.py demo DIR [--seed N]    the demo's datasets and tokenizer (needs scikit-learn)
    python launch/data.py index DIR              index WebDataset tar files made elsewhere
    python launch/data.py stats DIR              samples, media and tasks of every dataset below DIR
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file: Python put launch/ first on the path, where data.py would hide any package data
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".link")

from visionloom.launch.exit import exit_with
from visionloom.parallel.errors import UserError

if TYPE_CHECKING:
    from visionloom.data.demo import Progress
    from visionloom.data.shards import Dataset


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns 0, or 1 if the machine is at fault, and exits with 2 if the user is (one line each)."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        exit_with(error)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="data.py", description="Make, index and count shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="make the demo's datasets and tokenizer from handwritten digits")
    demo.add_argument("folder", type=Path, metavar="DIR", help="new folder, or one that this command made")
    demo.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")
    demo.add_argument("--scale", type=float, default=1.0, help="factor on the numbers of samples (default 1)")
    demo.set_defaults(run=_demo)
    index = commands.add_parser("index", help="index all .tar files of a folder and write dataset.json")
    index.add_argument("folder", type=Path, metavar="DIR")
    index.set_defaults(run=_index)
    stats = commands.add_parser("stats", help="count samples, media and tasks of every dataset below a folder")
    stats.add_argument("folder", type=Path, metavar="DIR")
    stats.set_defaults(run=_stats)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from visionloom.data.demo import make_demo

    if options.scale <= 0:
        raise UserError(f"--scale {options.scale:g}: a number above 0 expected")
    with _progress() as progress:
        made = make_demo(options.folder, options.seed, options.scale, progress)
    print(f"{options.folder}: {'made' if made else 'already made'}; have a look at {options.folder / 'contact_sheet.png'}")


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A bar for each part on a terminal, else one line for each finished part."""
    if not sys.stdout.isatty():
        yield _print_finished
        return
    from rich.progress import Progress, TaskID

    with Progress() as bars:
        tasks: dict[str, TaskID] = {}

        def show(part: str, done: int, total: int) -> None:
            if part not in tasks:
                tasks[part] = bars.add_task(part, total=total)
            bars.update(tasks[part], completed=done)

        yield show


def _print_finished(part: str, done: int, total: int) -> None:
    if done == total:
        print(f"{part}: {total:,} samples", flush=True)


def _index(options: argparse.Namespace) -> None:
    from visionloom.data.shards import Dataset, index_shards

    index_shards(options.folder)
    dataset = Dataset.open(options.folder, options.folder.name)
    print(f"{options.folder}: {len(dataset):,} samples in {len(dataset.shards)} shards")


@dataclass
class _Counts:
    """What one dataset holds."""

    samples: int = 0
    images: int = 0
    videos: int = 0
    frames: int = 0
    tasks: Counter[str] = field(default_factory=Counter)


def _stats(options: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
