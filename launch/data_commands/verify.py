"""`data.py verify DIR`: check every byte of a dataset."""

import argparse
from pathlib import Path

from visionloom.common.text import say
from visionloom.launch.data_commands.arguments import add_workers
from visionloom.launch.data_commands.progress import bars


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "verify", help="check the CRC-32 and header of every member; exit code 1 if any is bad"
    )
    parser.add_argument("folder", metavar="DIR", help="folder or URL of a dataset")
    parser.add_argument("--decode", action="store_true", help="decode every picture and video too")
    add_workers(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON lines of bad members (default DIR/verify.jsonl)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check all shards; interrupted, it goes on where it stopped."""
    from visionloom.data.inspect.verify import verify_dataset
    from visionloom.data.shards.open_store import is_url

    out = options.out or (
        Path("verify.jsonl") if is_url(options.folder) else Path(options.folder) / "verify.jsonl"
    )
    with bars() as progress:
        bad = verify_dataset(
            options.folder,
            out,
            options.decode,
            options.workers,
            lambda done, total: progress(options.folder, done, total),
        )
    say(
        f"{options.folder}: {len(bad):,} bad members, listed in {out}"
        if bad
        else f"{options.folder}: all good"
    )
    return 1 if bad else 0
