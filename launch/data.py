"""Shards: make them, index them, look at them and plan with them; each subcommand is a file of launch/shards/.

Commands:
    python launch/data.py --help
    python launch/data.py demo DIR [--seed N]    the demo's datasets and tokenizer (needs scikit-learn)
    python launch/data.py index DIR              index WebDataset tar files made elsewhere
    python launch/data.py stats DIR              samples, media and tasks of every dataset below DIR
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # started as a file: Python put launch/ first on the path, where data.py would hide any package data
    sys.path[0] = str(Path(__file__).resolve().parents[1] / ".link")

from visionloom.launch.exit import exit_with
from visionloom.launch.shards import demo, index, stats
from visionloom.parallel.errors import UserError

COMMANDS = (demo, index, stats)


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
    parser = argparse.ArgumentParser(prog="data.py", description="Make, index, check, plan and view shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
