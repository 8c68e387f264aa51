"""`data.py index DIR`: index WebDataset tar files that were made elsewhere."""

import argparse
from pathlib import Path


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser("index", help="index all .tar files of a folder and write dataset.json")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Read every shard once and write its index."""
    from visionloom.data.shards import Dataset, index_shards

    index_shards(options.folder)
    dataset = Dataset.open(options.folder, options.folder.name)
    print(f"{options.folder}: {len(dataset):,} samples in {len(dataset.shards)} shards")
