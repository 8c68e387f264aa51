"""`data.py convert KIND SRC DST`: other formats become shards; nothing is fetched from a network."""

import argparse
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from visionloom.launch.shards.progress import bars
from visionloom.parallel.errors import UserError

KINDS = ("llava", "sharegpt", "obelics", "omnicorpus", "mmc4", "hf", "folder", "jsonl", "webdataset")
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
STOPPED = 75
"""Exit code: stopped by the user, the same command continues."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser("convert", help="make shards from another format; the same command continues")
    parser.add_argument("kind", choices=KINDS, metavar="KIND", help=f"format of the source: {', '.join(KINDS)}")
    parser.add_argument("source", type=Path, metavar="SRC", help="file or folder")
    parser.add_argument("folder", type=Path, metavar="DST", help="new folder for the dataset")
    parser.add_argument("--name", help="name in shard files and sample ids (default: DST's name)")
    parser.add_argument("--shard-size", default="1GiB", help="most bytes of a shard, like 500MiB (default 1GiB)")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, help="most samples of a shard (default 10000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--images-dir", type=Path, help="where pictures lie; for URLs an output folder of img2dataset")
    parser.add_argument("--columns", nargs="+", default=[], metavar="ROLE=COLUMN", help="for hf: image=jpg text=caption")
    parser.add_argument("--limit", type=int, help="read so many records at most")
    parser.add_argument("--on-error", choices=("skip", "stop"), default="skip", help="what a bad record does (default skip)")
    parser.add_argument("--follow-links", action="store_true", help="allow links out of the source's folders")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert, and say what was skipped; 1 if that is more than half of the records."""
    from visionloom.data.convert.run import Request, convert
    from visionloom.data.write import ShardLimits
    from visionloom.data.write_parts import Target

    for name in ("samples_per_shard", "workers", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 expected")
    request = Request(
        options.kind,
        options.source,
        options.images_dir,
        columns_of(options.columns),
        options.limit,
        options.on_error == "stop",
        options.follow_links,
    )
    limits = ShardLimits(options.samples_per_shard, bytes_of(options.shard_size))
    target = Target(options.folder, options.name or options.folder.resolve().name, limits, options.workers)
    try:
        with bars("records") as progress:
            counts = convert(request, target, lambda done, total: progress(target.name, done, total))
    except KeyboardInterrupt:
        print(f"\nstopped: the same command continues {options.folder}", file=sys.stderr)
        return STOPPED
    print_summary(options.folder, counts)
    return int(counts["skipped"] * 2 > counts["records"])


def bytes_of(text: str) -> int:
    """A size like 500MiB in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B|)", text)
    if found is None or (size := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise UserError(f"--shard-size {text}: a size like 500MiB or 1GiB expected")
    return size


def columns_of(words: list[str]) -> dict[str, str]:
    """ROLE=COLUMN words as a mapping."""
    if wrong := [word for word in words if not re.fullmatch(r"\w+=.+", word)]:
        raise UserError(f"--columns {wrong[0]}: ROLE=COLUMN expected, like image=jpg")
    return {role: column for role, _, column in (word.partition("=") for word in words)}


def print_summary(folder: Path, counts: Mapping[str, int]) -> None:
    """What was made, what was left out and why."""
    from visionloom.data.shards import Dataset

    dataset = Dataset.open(folder, folder.name)
    mebibytes = sum(shard.bytes for shard in dataset.shards) / 2**20
    print(f"{folder}: {len(dataset):,} samples in {len(dataset.shards)} shards, {mebibytes:,.1f} MiB")
    if changed := counts.get("changed pictures"):
        print(f"  {changed:,} pictures turned upright or put on white (see meta.changed of their samples)")
    for title in ("left out", "skipped"):
        for name, count in sorted(counts.items(), key=lambda item: -item[1]):
            if name.startswith(f"{title}: "):
                print(f"  {count:,} {'pictures' if title == 'left out' else 'records'} {name}")
    if skipped := counts.get("skipped"):
        print(f"  {skipped:,} of {counts['records']:,} records skipped: see {folder / 'skipped.jsonl'}")
    print(f"  look at them: python launch/data.py view {folder}")
