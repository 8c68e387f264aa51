"""Arguments that several subcommands take, each declared once."""

import argparse
import os
from pathlib import Path

from visionloom.common.errors import UserError
from visionloom.data.config import CHAT_FORMATS


def add_media(parser: argparse.ArgumentParser) -> None:
    """Declare --media, the rules of pictures and videos."""
    parser.add_argument(
        "--media",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="as data.media.NAME of the run",
    )


def add_chat_format(parser: argparse.ArgumentParser) -> None:
    """Declare --chat-format, how chats are written."""
    parser.add_argument(
        "--chat-format",
        choices=CHAT_FORMATS,
        default=CHAT_FORMATS[0],
        help=f"as data.chat_format of the run (default {CHAT_FORMATS[0]})",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """Declare --workers, the processes that read or write shards."""
    parser.add_argument(
        "--workers",
        type=int,
        # None where the system does not say how many cores there are.
        default=os.cpu_count() or 1,
        help="processes (default: one for each core)",
    )


def add_processes(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Declare --processes, those that count lengths; `purpose` begins its help."""
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help=f"{purpose} (default: all cores)",
    )


def add_demo(parser: argparse.ArgumentParser, seed: str) -> None:
    """Declare what the commands that make the demo's data take; `seed` is the help of --seed."""
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="new folder, or one that this command made"
    )
    parser.add_argument("--seed", type=int, default=0, help=f"{seed} (default 0)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the numbers of samples (default 1)"
    )


def check_scale(options: argparse.Namespace) -> None:
    """Refuse a factor by which there would be no samples."""
    if options.scale <= 0:
        raise UserError(f"--scale {options.scale:g}: a number above 0 expected")


def counting_processes(options: argparse.Namespace) -> int:
    """Return how many processes count beside this one."""
    # One process needs no other beside it: it counts itself, and none has to start.
    return options.processes if options.processes > 1 else 0
