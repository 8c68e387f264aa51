"""`data.py export-energon DIR`: metadata beside the shards, so that megatron-energon can read them too."""

import argparse
from pathlib import Path

from visionloom.common.errors import UserError
from visionloom.common.text import say
from visionloom.launch.data_commands.progress import bars


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "export-energon", help="write .nv-meta and .tar.idx for megatron-energon 7"
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=SHARE",
        help="shares of the shards, in order (default train=1)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the metadata from the shards' indexes."""
    from visionloom.data.shards.energon import export_energon

    splits = dict(split_of(text) for text in options.split)
    with bars("shards") as progress:
        parts = export_energon(
            options.folder, splits, lambda done, total: progress(str(options.folder), done, total)
        )
    counts = [f"{name} {len(files)} shards" for name, files in parts.items()]
    say(f"{options.folder}: {', '.join(counts)}")


def split_of(text: str) -> tuple[str, float]:
    """Parse NAME=SHARE; shares may be in any unit, only their proportions count."""
    name, _, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = -1.0  # refused below, as other shares that cannot be
    if not name.isidentifier() or value <= 0:
        raise UserError(f"--split {text}: NAME=SHARE expected, like train=0.9")
    return name, value
