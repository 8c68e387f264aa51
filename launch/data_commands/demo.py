"""`data.py demo DIR`: the demo's datasets and tokenizer, from handwritten digits."""

import argparse
from pathlib import Path

from visionloom.common.errors import UserError
from visionloom.common.text import say
from visionloom.launch.data_commands.progress import bars


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "demo", help="make the demo's datasets and tokenizer from handwritten digits"
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="new folder, or one that this command made"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the numbers of samples (default 1)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the data, unless this command has made it already."""
    from visionloom.data.demo.make import make_demo

    if options.scale <= 0:
        raise UserError(f"--scale {options.scale:g}: a number above 0 expected")
    with bars() as progress:
        made = make_demo(options.folder, options.seed, options.scale, progress)
    say(
        f"{options.folder}: {'made' if made else 'already made'}; have a look at {options.folder / 'contact_sheet.png'}"
    )
