"""`data.py demo-task DIR`: a task that the demo does not teach, to fine-tune its model on."""

import argparse

from visionloom.common.text import say
from visionloom.launch.data_commands.arguments import add_demo, check_scale
from visionloom.launch.data_commands.progress import bars


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "demo-task", help="make a new task for the demo's model: digits as words"
    )
    add_demo(parser, "of the demo's data")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the data, unless this command has made it already."""
    from visionloom.data.demo.new_task import make_task

    check_scale(options)
    with bars() as progress:
        made = make_task(options.folder, options.seed, options.scale, progress)
    say(f"{options.folder}: {'made' if made else 'already made'}")
