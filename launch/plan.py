"""Know before renting: memory, time and cost of a run on GPUs that need not be there.

Commands:
    python launch/plan.py +recipe=NAME world=N [gpu=h100] [key=value ...]    every phase of a run on N GPUs
    python launch/plan.py search +recipe=NAME world=N [key=value ...]        the layouts that are possible, the fastest first
    python launch/plan.py table FILE                                         every shipped recipe, as a table for docs/plans.md

A real step of every kind of rank is run on no device at all; its operations are timed by assumptions (recipes/gpu/). No GPU has
confirmed the times. No data, model folder or tokenizer is needed. docs/planning.md has the words and the limits.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if not __package__:
    # Started as a file: Python put launch/ first on the path, where data.py would hide any package data.
    root = Path(__file__).resolve().parents[1]
    sys.path[0] = str(root / ".link")

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError, did_you_mean
from visionloom.common.quiet import quiet_libraries
from visionloom.common.screen import PlainConsole
from visionloom.common.text import one_line, say, warn
from visionloom.forecast.machine import machine_names
from visionloom.forecast.show.document import JSON, PAGE, document
from visionloom.launch.configure import compose
from visionloom.launch.data_commands.progress import bars
from visionloom.launch.guarding.claim import check_writable
from visionloom.launch.guarding.exit import CANNOT_RUN, code_of
from visionloom.launch.plan_commands.words import read_plan_words

if TYPE_CHECKING:
    from visionloom.forecast.results import RunForecast

COMMANDS: Final = ("search", "table")
HELP: Final = """usage: plan.py [search] +recipe=NAME world=N [gpu=NAME] [word=value ...] [key=value ...]
       plan.py table FILE

Memory, time and cost of a run before any GPU is rented. Numbers are predicted: on one
H100 steps took 4 to 11 % longer, and nothing was measured on more than one.

words of the plan:
  world=N          GPUs of the run, a rank on each
  gpu=NAME         one of {gpus} (default h100)
  memory=GIB       memory of each card, if it is not that of the file recipes/gpu/NAME.yaml
  imbalance=X      tokens of a mixture's busiest rank of experts, as a multiple of the mean (default 1)
  phase=NAME       one phase only
  out=DIR          folder of plan.json and plan.html (default: plan/ in the run's folder)
key=value          options of the run, as launch/pretrain.py takes them; --config-dir and --cfg job too

search             layouts of the run's model that are possible on these GPUs, the fastest first
table FILE         every shipped recipe on the GPUs that its header states, as a table of Markdown

Exit code 0: it fits. 1: it does not, or this machine failed. 2: a word is wrong, or the layout cannot be built.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; a user's error exits with 2, one line each."""
    quiet_libraries()
    words = list(sys.argv[1:] if arguments is None else arguments)
    return code_of(lambda: run(words))


def run(argv: list[str]) -> int:
    """Do what the command line says and return the exit code."""
    if not argv or {"--help", "-h"} & set(argv):
        say(HELP.format(gpus=", ".join(machine_names())).rstrip())
        return 0

    if argv[0] == "table":
        from visionloom.launch.plan_commands.table import write_table

        return write_table(argv[1:])
    if argv[0] == "search":
        from visionloom.launch.plan_commands.search import search_layouts

        return search_layouts(argv[1:])
    # Words of a run have one of these; Hydra would say of a mistyped command that it lacks `=value`.
    if argv[0][0:1] not in ("+", "-", "~") and "=" not in argv[0]:
        close = did_you_mean(argv[0], COMMANDS)
        raise UserError(
            f"{one_line(argv[0])} is no command of plan.py{close}: there are {' and '.join(COMMANDS)}, and none plans"
        )
    return plan(argv)


def plan(argv: Sequence[str]) -> int:
    """Plan the run of the command line: tables on the screen, plan.json and plan.html in a folder."""
    own, words = read_plan_words(argv)
    config = compose(words, own.world)
    if config is None:
        return 0
    request = own.request(config)
    # Before a minute of work: a folder that cannot be written is known at once.
    folder = Path(own.out or f"{config.run.folder}/plan")
    check_writable(folder, "out" if own.out else "run.folder")

    # torch and megatron-core are imported only now, when the words are known to be good.
    from visionloom.forecast.run import forecast_run

    with bars("traces") as progress:
        forecast = forecast_run(request, progress)
    show(forecast)
    write(forecast, folder)
    say(f"plan: {folder / PAGE}, {folder / JSON}")
    return 0 if forecast.can_run else CANNOT_RUN


def show(forecast: "RunForecast") -> None:
    """Print the tables, and what is wrong on standard error."""
    from visionloom.forecast.show.tables import tables_of

    # A pipe has no width; 160 columns hold the tables without breaking most of their cells.
    console = PlainConsole(width=None if sys.stdout.isatty() else 160)
    for table in tables_of(forecast):
        console.print(table)
    for note in forecast.notes:
        say(f"note: {one_line(note)}")
    for fault in forecast.faults:
        warn(f"wrong: {one_line(fault)}")


def write(forecast: "RunForecast", folder: Path) -> None:
    """Write plan.json and plan.html; those that are there are replaced."""
    from visionloom.forecast.show.page import page_of

    text = json.dumps(document(forecast), indent=1, ensure_ascii=False)
    for name, content in ((JSON, f"{text}\n"), (PAGE, page_of(forecast))):
        # Names of recipes may hold half of a surrogate pair, which UTF-8 has no bytes for.
        with replacing(folder / name, durable=False) as file:
            file.write(content.encode("utf-8", "backslashreplace"))


if __name__ == "__main__":
    sys.exit(main())
