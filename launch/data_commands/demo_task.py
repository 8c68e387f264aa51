"""`data.py demo-task DIR`: a task that the demo does not teach, to fine-tune its model on."""

import argparse
from pathlib import Path

from visionloom.common.errors import UserError
from visionloom.common.text import say
from visionloom.launch.data_commands.progress import bars


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "demo-task", help="make a new task for the demo's model: digits as words"
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="new folder, or one that this command made"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the demo's data (default 0)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor on the numbers of samples (default 1)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the data, unless this command has made it already."""
    from visionloom.data.demo.new_task import make_task

    if options.scale <= 0:
        raise UserError(f"--scale {options.scale:g}: a number above 0 expected")
    with bars() as progress:
        made = make_task(options.folder, options.seed, options.scale, progress)
    say(f"{options.folder}: {'made' if made else 'already made'}")
