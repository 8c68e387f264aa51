"""The options of a command that composes a run, apart from its `key=value` words.

Hydra's own command line has more: options that start sweeps, run callbacks and print its internals. They do not exist here.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from visionloom.common.errors import UserError
from visionloom.launch.environment import check_home

HELP = """options, before, between or behind the words:
  --cfg job            show what would run, and do nothing
  --resolve            with --cfg job: references replaced by what they refer to
  --package KEY        with --cfg job: one section, such as phases.align
  --config-dir DIR     your own recipes beside ours: DIR/recipe/NAME.yaml
  --help               this text, the groups and every option with its value
"""


@dataclass(frozen=True)
class CommandLine:
    """What stands on a command line."""

    words: list[str] = field(default_factory=list)
    """Overrides, in the order in which they were written."""
    config_dir: str = ""
    """Folder of the user's own recipes; empty: none."""
    show: bool = False
    """Show the configuration instead of running it."""
    resolve: bool = False
    package: str = ""
    """Section to show; empty: all."""
    help: bool = False


class _Parser(argparse.ArgumentParser):
    def __init__(self) -> None:
        # No abbreviations: a new option would change what an old command line means.
        super().__init__(add_help=False, allow_abbrev=False)
        self.add_argument("words", nargs="*")
        self.add_argument("--config-dir", "-cd", default="")
        self.add_argument("--cfg", "-c", choices=["job"])
        self.add_argument("--resolve", action="store_true")
        self.add_argument("--package", "-p", default="")
        self.add_argument("--help", "-h", action="store_true")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}")


def read_options(argv: Sequence[str]) -> CommandLine:
    """Tell options from words, wherever they stand; raises UserError for an option that does not exist."""
    if {"-m", "--multirun"} & set(argv):
        raise UserError(
            "--multirun is refused: every rank would sweep by itself; start one run for each value"
        )
    given = _Parser().parse_intermixed_args(list(argv))
    check_home("--config-dir", given.config_dir)
    if (given.resolve or given.package) and not given.cfg:
        raise UserError(
            "command line: --resolve and --package say how --cfg job shows a run: add --cfg job"
        )
    return CommandLine(
        given.words,
        given.config_dir,
        given.cfg is not None,
        given.resolve,
        given.package,
        given.help,
    )
