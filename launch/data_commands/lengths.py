"""`data.py lengths DIR ...`: count tokens and patches of every sample, without decoding a picture."""

import argparse
import functools
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from visionloom.common.errors import UserError
from visionloom.common.progress import PartProgress
from visionloom.common.screen import PlainConsole
from visionloom.common.settings import check
from visionloom.launch.data_commands.arguments import (
    add_chat_format,
    add_media,
    add_processes,
    counting_processes,
)
from visionloom.launch.data_commands.progress import bars

if TYPE_CHECKING:
    from visionloom.common.progress import ProgressOf
    from visionloom.data.config import MediaConfig
    from visionloom.data.plan.dataset_with_lengths import DatasetWithLengths

COLUMNS = (
    "dataset",
    "samples",
    "tokens",
    "mean",
    "p99",
    "longest",
    "visual",
    "supervised",
    "unusable",
    "seconds",
)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "lengths", help="count tokens and patches of datasets, as plans need them"
    )
    parser.add_argument(
        "folders", type=Path, metavar="DIR", nargs="+", help="a dataset, or a folder of some"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="FOLDER",
        help="of a Hugging Face tokenizer (data.tokenizer)",
    )
    add_media(parser)
    add_chat_format(parser)
    parser.add_argument(
        "--cache",
        default="",
        metavar="DIR",
        help="folder for the tables (data.cache; default: DIR/cache)",
    )
    add_processes(parser, "that count at once")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Count what is not counted yet and print a table with a row for each dataset."""
    from rich.table import Table

    from visionloom.data.config import DataConfig, DatasetConfig
    from visionloom.data.encode.tokenizer import Tokenizer
    from visionloom.data.plan.dataset_with_lengths import DatasetWithLengths
    from visionloom.data.plan.resumable import CountingHelp

    data = DataConfig(
        tokenizer=options.tokenizer,
        chat_format=options.chat_format,
        media=media_config(options.media),
        cache=options.cache,
    )
    tokenizer = Tokenizer.of(data)
    table = Table(*COLUMNS)
    with bars() as progress:
        # The clock is for each dataset: counting is what takes the time, and once.
        helpers = CountingHelp(counting_processes(options), report_to(progress))
        for folder, name in datasets_below(options.folders).items():
            started = time.perf_counter()
            config = DatasetConfig(path=str(folder))
            dataset = DatasetWithLengths("lengths", name, config, data, tokenizer, helpers)
            table.add_row(*_cells(dataset, time.perf_counter() - started))
    PlainConsole(width=None if sys.stdout.isatty() else 140).print(table)


def report_to(progress: PartProgress) -> "ProgressOf":
    """Return the progress callbacks of counting that move the bars of a screen."""
    return lambda name: functools.partial(progress, name)


def datasets_below(folders: list[Path]) -> dict[Path, str]:
    """Return all datasets in or below some folders, each with a name; UserError if there are none."""
    from visionloom.data.shards.manifest import MANIFEST

    datasets = dict[Path, str]()
    for folder in folders:
        below = sorted(path.parent for path in folder.rglob(MANIFEST))
        if not below:
            raise UserError(
                f"no {MANIFEST} in or below {folder}: run python launch/data.py index DIR"
            )
        for path in below:
            datasets[path] = str(path.relative_to(folder)) if path != folder else folder.name
    return datasets


TYPES: dict[str, type[str] | type[float]] = {"rule": str, "video_fps": float}
"""Of the rules that are no whole numbers."""


def media_config(words: list[str]) -> "MediaConfig":
    """Return the rules that NAME=VALUE words describe.

    Raises:
        UserError: for unknown names, and for values that no run can have.
    """
    from visionloom.data.config import MediaConfig

    config = MediaConfig()
    known = {item.name for item in fields(config)}
    for word in words:
        name, _, value = word.partition("=")
        if name not in known:
            raise UserError(f"--media {word}: unknown, use one of {', '.join(sorted(known))}")
        try:
            setattr(config, name, TYPES.get(name, int)(value))
        except ValueError:
            raise UserError(f"--media {word}: a number expected") from None
    # The bounds are those of a run's own options, so that both refuse the same.
    if problems := check(config, "data.media").lines:
        raise UserError(*problems)
    return config


def _cells(dataset: "DatasetWithLengths", seconds: float) -> list[str]:
    import numpy as np

    lengths = dataset.lengths
    # A sample that cannot be rendered has no tokens; it is no part of the means.
    tokens = lengths["tokens"][lengths["tokens"] > 0]
    # Columns of 32 bits: their sum would overflow at two milliard tokens.
    total = int(tokens.sum(dtype=np.int64))
    # Four patches become one token.
    visual = int(lengths["patches"].sum(dtype=np.int64)) // 4
    supervised = int(lengths["supervised"].sum(dtype=np.int64))
    mean = high = most = 0.0
    if len(tokens):
        mean, high, most = tokens.mean(), np.percentile(tokens, 99), tokens.max()

    counts = [f"{number:,.0f}" for number in (len(lengths), total, mean, high, most)]
    shares = [f"{part / max(total, 1):.0%}" for part in (visual, supervised)]
    unusable = f"{len(dataset.unreadable):,}"
    return [dataset.name, *counts, *shares, unusable, f"{seconds:.1f}"]
