"""`data.py convert KIND SRC DST`: other formats become shards; nothing is fetched from a network."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visionloom.common.errors import UserError
from visionloom.common.text import one_line, say, warn
from visionloom.launch.data_commands.arguments import add_media, add_workers
from visionloom.launch.data_commands.progress import bars

if TYPE_CHECKING:
    from visionloom.data.convert.run import Request
    from visionloom.data.convert.trainable import Trainable
    from visionloom.data.shards.write_parts import Tally, Target

KINDS = (
    "llava",
    "sharegpt",
    "obelics",
    "omnicorpus",
    "mmc4",
    "hf",
    "folder",
    "jsonl",
    "webdataset",
)
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SECTIONS = (
    ("left out", ""),
    ("pictures left out", "  pictures left out of documents:"),
    ("not read", "  keys that were not read, and so have no effect on training:"),
    ("marks kept as words", "  marks that stay words, since users and tools cannot open turns:"),
)
"""Parts of the summary: what the names of its counts begin with, and a heading."""
STOPPED = 75
"""Exit code: stopped by the user, the same command continues."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "convert", help="make shards from another format; the same command continues"
    )
    parser.add_argument(
        "kind", choices=KINDS, metavar="KIND", help=f"format of the source: {', '.join(KINDS)}"
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="file or folder")
    parser.add_argument("folder", type=Path, metavar="DST", help="new folder for the dataset")
    add_target(parser)
    add_reading(parser)
    add_rendering(parser)
    parser.add_argument(
        "--follow-links", action="store_true", help="allow links out of the source's folders"
    )
    parser.set_defaults(run=run)


def add_target(parser: argparse.ArgumentParser) -> None:
    """Declare the words on the shards that are written."""
    parser.add_argument("--name", help="name in shard files and sample ids (default: DST's name)")
    parser.add_argument(
        "--shard-size", default="1GiB", help="most bytes of a shard, like 500MiB (default 1GiB)"
    )
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=10_000,
        help="most samples of a shard (default 10000)",
    )
    add_workers(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Declare the words on how the source is read."""
    parser.add_argument(
        "--images-dir",
        type=Path,
        help="where pictures lie; for URLs an output folder of img2dataset",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="ROLE=COLUMN",
        help="for hf: image=jpg text=caption",
    )
    parser.add_argument("--limit", type=int, help="read so many records at most")
    parser.add_argument(
        "--on-error",
        choices=("skip", "stop"),
        default="skip",
        help="what a bad record does (default skip)",
    )
    parser.add_argument(
        "--max-left-out",
        default="5%",
        metavar="SHARE",
        help="exit code 1 if more are left out (default 5%%)",
    )
    parser.add_argument(
        "--task",
        help="evaluation task of the samples' last answers, where a record names none (key task)",
    )


def add_rendering(parser: argparse.ArgumentParser) -> None:
    """Declare the words on which samples a run could train on: others are left out."""
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="FOLDER",
        help="count tokens, and leave out what no policy can fit",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        help="tokens of the longest pack, with --tokenizer (default 262144)",
    )
    add_media(parser)


def run(options: argparse.Namespace) -> int:
    """Convert, and say what was left out and what was not read; 1 if more records than allowed were left out."""
    from visionloom.data.convert.run import convert

    refuse_below_one(options)
    most = share_of(options.max_left_out)
    request, target = request_of(options), target_of(options)
    try:
        with bars("records") as progress:
            tally = convert(request, target, lambda done, total: progress(target.name, done, total))
    except KeyboardInterrupt:
        warn("", f"stopped: the same command continues {options.folder}")
        return STOPPED
    Summary(options.folder, tally).show()
    return exit_code(options, tally, most)


def refuse_below_one(options: argparse.Namespace) -> None:
    """Refuse numbers that nothing can be made with."""
    for name in ("samples_per_shard", "workers", "limit", "sequence_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 expected")


def request_of(options: argparse.Namespace) -> "Request":
    """Return what is read, and how; UserError for columns or a tokenizer that cannot be read."""
    from visionloom.data.convert.run import Request

    return Request(
        options.kind,
        options.source,
        options.images_dir,
        columns_of(options.columns),
        options.limit,
        options.on_error == "stop",
        options.follow_links,
        options.task,
        trainable_by(options),
    )


def target_of(options: argparse.Namespace) -> "Target":
    """Return where shards are written, and how large; UserError for a size that cannot be read."""
    from visionloom.data.shards.write import ShardLimits
    from visionloom.data.shards.write_parts import Target

    limits = ShardLimits(options.samples_per_shard, bytes_of(options.shard_size))
    # Resolved, so that `.` has a name too.
    name = options.name or options.folder.resolve().name
    return Target(options.folder, name, limits, options.workers)


def exit_code(options: argparse.Namespace, tally: "Tally", most: float) -> int:
    """Return 1, with a line, if a larger share of the records than `most` was left out; else 0."""
    records, left_out = tally.counts["records"], tally.counts["left out"]
    if left_out <= most * records:
        return 0
    warn(
        f"error: {left_out:,} of {records:,} records left out, more than --max-left-out {options.max_left_out}:"
        f" mend the source by {options.folder / 'skipped.jsonl'}, or allow a larger share"
    )
    return 1


def trainable_by(options: argparse.Namespace) -> "Trainable":
    """Return the rules that samples are rendered by; UserError for a tokenizer that cannot be read."""
    from visionloom.data.convert.trainable import LONGEST, Trainable
    from visionloom.data.encode.tokenizer import Tokenizer
    from visionloom.launch.data_commands.lengths import media_config

    if options.sequence_length and not options.tokenizer:
        raise UserError("--sequence-length needs --tokenizer FOLDER, by which tokens are counted")
    if options.tokenizer:
        try:
            Tokenizer(options.tokenizer)
        except UserError as error:
            # This command has another word for it than a run.
            lines = [line.replace("data.tokenizer=", "--tokenizer ", 1) for line in error.lines]
            raise UserError(*lines) from None
    longest = options.sequence_length or LONGEST
    return Trainable(media_config(options.media), options.tokenizer, longest)


def share_of(text: str) -> float:
    """Parse a share like 5% or 0.05."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0  # refused below, as other shares that cannot be
    if not 0 <= share <= 1:
        raise UserError(f"--max-left-out {text}: a share like 5% or 0.05 expected")
    return share


def bytes_of(text: str) -> int:
    """Parse a size like 500MiB into bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B|)", text)
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"--shard-size {text}: a size like 500MiB or 1GiB expected")
    return size


def columns_of(words: list[str]) -> dict[str, str]:
    """Parse ROLE=COLUMN words."""
    columns = {}
    for word in words:
        if not re.fullmatch(r"\w+=.+", word):
            raise UserError(f"--columns {word}: ROLE=COLUMN expected, like image=jpg")
        role, _, column = word.partition("=")
        columns[role] = column
    return columns


@dataclass(frozen=True)
class Summary:
    """The text that the command ends with."""

    folder: Path
    tally: "Tally"

    def show(self) -> None:
        """Print what was made, what was left out and why, and which keys were not read."""
        self.show_size()
        # The commonest first; equal counts by name, so that two runs print alike.
        totals = self.tally.counts
        names = sorted(totals, key=lambda name: (-totals[name], name))
        counts = {name: totals[name] for name in names}
        self.show_left_out()
        for title, heading in SECTIONS:
            self.show_section(title, heading, counts)
        for name, count in counts.items():
            # Names with a colon stand in a section, these three in the lines above.
            if ": " not in name and name not in ("records", "samples", "left out"):
                say(one_line(f"  {count:,} {name} (first: {self.tally.first[name]})"))
        say(f"  look at them: python launch/data.py view {self.folder}")

    def show_size(self) -> None:
        """Print how much was made."""
        from visionloom.data.shards.dataset import Dataset

        # As a reader opens it: what cannot be read again is found here, not in a run.
        dataset = Dataset.open(self.folder, self.folder.name)
        samples, shards = len(dataset), len(dataset.shards)
        mebibytes = sum(shard.bytes for shard in dataset.shards) / 2**20
        say(f"{self.folder}: {samples:,} samples in {shards} shards, {mebibytes:,.1f} MiB")

    def show_left_out(self) -> None:
        """Print how many records were left out, if any."""
        records = self.tally.counts.get("records", 0)
        left_out = self.tally.counts.get("left out", 0)
        if left_out:
            share, listed = left_out / records, self.folder / "skipped.jsonl"
            say(f"  {left_out:,} of {records:,} records left out ({share:.1%}), each in {listed}:")

    def show_section(self, title: str, heading: str, counts: dict[str, int]) -> None:
        """Print the counts whose names begin with a title, each with its first record."""
        start = f"{title}: "
        own = {name: count for name, count in counts.items() if name.startswith(start)}
        if own and heading:
            say(heading)
        first = self.tally.first
        for name, count in own.items():
            where = f" (first: {first[name]})" if name in first else ""
            say(one_line(f"    {count:,} {name.removeprefix(start)}{where}"))
