"""`data.py demo DIR`: the demo's datasets and tokenizer, from handwritten digits."""

import argparse

from visionloom.common.text import say
from visionloom.launch.data_commands.arguments import add_demo, check_scale
from visionloom.launch.data_commands.progress import bars


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "demo", help="make the demo's datasets and tokenizer from handwritten digits"
    )
    add_demo(parser, "the same seed gives the same bytes")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Make the data, unless this command has made it already."""
    from visionloom.data.demo.make import make_demo

    check_scale(options)
    with bars() as progress:
        made = make_demo(options.folder, options.seed, options.scale, progress)
    say(
        f"{options.folder}: {'made' if made else 'already made'}; have a look at {options.folder / 'contact_sheet.png'}"
    )
