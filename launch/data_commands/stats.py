"""`data.py stats DIR`: samples, media and tasks of every dataset below a folder, as their dataset.json counts them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from visionloom.common.errors import UserError
from visionloom.common.screen import PlainConsole

if TYPE_CHECKING:
    from visionloom.data.shards.manifest import ShardInfo

COLUMNS = (
    "dataset",
    "samples",
    "shards",
    "MiB",
    "text MiB",
    "images",
    "videos",
    "frames",
    "video h",
    "Gpixel",
    "tasks",
)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "stats", help="count samples, media and tasks of every dataset below a folder"
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print a table with a row for each dataset."""
    from rich.table import Table

    from visionloom.data.shards.manifest import MANIFEST, read_manifest

    # The manifests hold the counts: no shard is opened, so any size takes a moment.
    manifests = sorted(options.folder.rglob(MANIFEST))
    if not manifests:
        raise UserError(
            f"no {MANIFEST} in or below {options.folder}: run python launch/data.py index DIR"
        )
    table = Table(*COLUMNS)
    for path in manifests:
        name = (
            str(path.parent.relative_to(options.folder))
            if path.parent != options.folder
            else path.parent.name
        )
        table.add_row(name, *_cells(read_manifest(path.parent, "stats")))
    # A pipe has no width; 160 columns hold the table without breaking its cells.
    PlainConsole(width=None if sys.stdout.isatty() else 160).print(table)


def _cells(shards: "tuple[ShardInfo, ...]") -> list[str]:
    from visionloom.data.shards.manifest import Statistics

    total, samples, size = Statistics(), 0, 0
    for shard in shards:
        total += shard.statistics
        samples += shard.samples
        size += shard.bytes
    tasks = [f"{task} {number:,}" for task, number in total.tasks.items()]
    return [
        f"{samples:,}",
        f"{len(shards):,}",
        f"{size / 2**20:,.1f}",
        f"{total.text_bytes / 2**20:,.1f}",
        f"{total.images:,}",
        f"{total.videos:,}",
        f"{total.frames:,}",
        f"{total.duration / 3600:,.2f}",
        f"{total.pixels / 1e9:,.3f}",
        ", ".join(tasks),
    ]
