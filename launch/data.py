"""Shards: make them, index them, look at them and plan with them; each subcommand is a file of launch/data_commands/.

Commands:
    python launch/data.py --help
    python launch/data.py demo DIR [--seed N]    the demo's datasets and tokenizer (needs scikit-learn)
    python launch/data.py demo-task DIR          a task that the demo does not teach, for fine-tuning
    python launch/data.py convert KIND SRC DST   LLaVA, ShareGPT, OBELICS, MMC4, ... as shards
    python launch/data.py filter SRC DST ...     keep the samples that are within bounds: length, repetition, pass rate, ...
    python launch/data.py index DIR              index WebDataset tar files made elsewhere
    python launch/data.py view DIR [KEY ...]     samples as a web page: pictures, boxes, frames, tokens, packs
    python launch/data.py lengths DIR ... --tokenizer FOLDER    tokens and patches of every sample, for plans
    python launch/data.py plan +recipe=NAME      fill, losses, tokens and balance of a run's phases, before any training
    python launch/data.py stats DIR              samples, media and tasks of every dataset below DIR
    python launch/data.py verify DIR [--decode]  check every member: bytes, headers, and pixels
    python launch/data.py export-energon DIR     metadata for megatron-energon beside the shards
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.common.errors import UserError
from visionloom.common.quiet import Parser, escape_messages
from visionloom.common.text import one_line, warn
from visionloom.launch.data_commands import (
    convert,
    demo,
    demo_task,
    export_energon,
    filter,
    index,
    lengths,
    plan,
    stats,
    verify,
    view,
)
from visionloom.launch.guarding.exit import exit_with

COMMANDS = (
    demo,
    demo_task,
    convert,
    filter,
    index,
    lengths,
    plan,
    stats,
    verify,
    view,
    export_energon,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code.

    That is 0, what the subcommand returns, or 1 if the machine is at fault; a user's error exits with 2 (one line each).
    """
    escape_messages()
    parser = make_parser()
    # Words that no subcommand declares belong to a run: only `plan` takes them.
    options, words = parser.parse_known_args(arguments)
    if words and "words" not in options:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    options.words = words
    try:
        return options.run(options) or 0
    except UserError as error:
        exit_with(error)
    except OSError as error:
        warn(f"error: {one_line(str(error))}")
        return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all subcommands; neither numpy nor torch is imported for it."""
    parser = Parser(prog="data.py", description="Make, index, check, plan and view shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
