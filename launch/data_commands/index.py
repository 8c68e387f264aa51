"""`data.py index DIR`: index WebDataset tar files that were made elsewhere."""

import argparse
from pathlib import Path

from visionloom.common.text import say
from visionloom.launch.data_commands.arguments import add_workers
from visionloom.launch.data_commands.progress import bars


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "index", help="index all .tar files of a folder and write dataset.json"
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    add_workers(parser)
    parser.add_argument(
        "--force", action="store_true", help="read shards again whose index still fits"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave bad samples out and list them in left_out.jsonl",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Read every shard once and write its index; started again, it continues where it stopped."""
    from visionloom.data.shards.index_folder import LEFT_OUT, index_folder

    folder: Path = options.folder
    with bars("shards") as progress:
        rows = index_folder(
            folder,
            options.workers,
            options.force,
            options.skip_bad,
            lambda done, total: progress(str(folder), done, total),
        )
    samples = sum(row.samples for row in rows)
    say(f"{folder}: {samples:,} samples in {len(rows)} shards")
    suspects = sum(row.statistics.suspect_media for row in rows)
    if suspects:
        # Only decoding can tell whether they are bad, which an index does not do.
        say(
            f"{suspects:,} media members have a header that cannot be read or differs from their sample: see data.py verify"
        )
    left_out = folder / LEFT_OUT
    if left_out.exists():
        say(f"some samples were left out: see {left_out}")
