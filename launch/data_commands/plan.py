"""`data.py plan WORDS`: what the phases of a run will train on, from lengths alone: fill, losses, tokens, balance, time."""

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from visionloom.common.errors import UserError
from visionloom.common.screen import PlainConsole
from visionloom.launch.data_commands.arguments import add_processes, counting_processes
from visionloom.launch.data_commands.progress import bars

if TYPE_CHECKING:
    from rich.table import Table

    from visionloom.data.plan.facts import PlanFacts
    from visionloom.data.plan.plan import MixtureEntry, Plan
    from visionloom.train.config import RunConfig

PHASE_COLUMNS = (
    "phase",
    "length",
    "steps",
    "packs",
    "fill",
    "patches",
    "ranks",
    "max/mean",
    "useful",
    "µs/sample",
)
DATASET_COLUMNS = (
    "phase",
    "dataset",
    "over_length",
    "samples",
    "tokens",
    "share",
    "visual",
    "left out",
    "tokens left out",
)
STEPS = 200
"""Steps of a phase that are planned unless --steps says otherwise."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command's words."""
    parser = commands.add_parser(
        "plan",
        help="fill, losses, tokens and balance of a run's phases, before any training",
        usage="data.py plan +recipe=NAME [key=value ...] [--config-dir DIR] [options]",
        epilog="Words and --config-dir are those of launch/pretrain.py.",
    )
    parser.add_argument("--phase", metavar="NAME", help="one phase only")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"steps of each phase to plan (default {STEPS})"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="of the whole run (default: WORLD_SIZE, or 1)"
    )
    parser.add_argument(
        "--data-parallel",
        type=int,
        metavar="N",
        help="deal packs to so many (default: as --ranks and layout say)",
    )
    add_processes(parser, "that count lengths")
    parser.set_defaults(run=run, words=[])  # what is not declared here are words of the run


def run(options: argparse.Namespace) -> None:
    """Print two tables: a row for each phase, and a row for each dataset of a phase."""
    from visionloom.data.plan.facts import facts_of
    from visionloom.launch.configure import check_paths, compose
    from visionloom.launch.environment import world_size

    world = options.ranks or world_size()
    config = compose(options.words, world)
    if config is None:
        return
    # Before any dataset is counted, which may take long.
    check_paths(config)
    tables = PlanTables.empty()
    for name in chosen_phases(config, options.phase):
        phase = config.phases[name]
        layout = phase.parallel or config.parallel
        ranks = options.data_parallel or layout.data_parallel_size(world)
        plan = plan_phase(config, name, counting_processes(options))
        steps = min(options.steps, phase.total_steps)
        facts = facts_of(plan, steps, ranks, phase.micro_batch)
        tables.add_phase(name, facts)
        tables.add_datasets(name, plan, facts)
    tables.show()


def plan_phase(config: "RunConfig", name: str, processes: int = 0) -> "Plan":
    """Return the plan of a phase, as a run begins it; `processes` count lengths that are not counted yet."""
    from visionloom.data.encode.tokenizer import Tokenizer
    from visionloom.data.plan.open import dataset_weights, open_datasets, open_plan
    from visionloom.data.plan.resumable import CountingHelp
    from visionloom.launch.data_commands.lengths import report_to
    from visionloom.train.stream_options import stream_options

    options = stream_options(config, name)
    names = list(dataset_weights(options.data, options.mixture))
    tokenizer = Tokenizer.of(options.data)
    with bars() as progress:
        helpers = CountingHelp(processes, report_to(progress))
        datasets = open_datasets(options.data, names, tokenizer, helpers)
        return open_plan(options, datasets)


def chosen_phases(config: "RunConfig", wanted: str | None) -> list[str]:
    """Return the phases to plan: all whose packs are planned, or the one of --phase.

    Raises:
        UserError: if the recipe lacks it, or it trains on answers that are not written yet.
    """
    planned = [name for name, phase in config.phases.items() if phase.rl is None]
    if wanted is None:
        return planned
    if wanted in config.phases and wanted not in planned:
        raise UserError(
            f"--phase {wanted} trains on answers that it writes itself, so nothing is planned: leave it out, or plan its memory and"
            f" time by launch/plan.py"
        )
    if wanted not in config.phases:
        raise UserError(
            f"--phase {wanted} is not in the recipe: use one of {', '.join(config.phases)}"
        )
    return [wanted]


@dataclass(frozen=True)
class PlanTables:
    """The two tables that the command prints."""

    phases: "Table"
    datasets: "Table"

    @classmethod
    def empty(cls) -> "PlanTables":
        """Return tables without rows."""
        # rich takes a tenth of a second to import, which help need not wait for.
        from rich.table import Table

        return cls(Table(*PHASE_COLUMNS), Table(*DATASET_COLUMNS))

    def add_phase(self, name: str, facts: "PlanFacts") -> None:
        """Add the row of a phase."""
        self.phases.add_row(
            name,
            f"{facts.sequence_length:,}",
            f"{facts.steps:,}",
            f"{facts.packs:,}",
            f"{facts.fill:.2%}",
            f"{facts.patch_fill:.1%}",
            f"{facts.ranks:,}",
            f"{facts.worst:.3f}",
            f"{facts.useful:.1%}",
            f"{facts.seconds_per_sample * 1e6:.1f}",
        )

    def add_datasets(self, phase: str, plan: "Plan", facts: "PlanFacts") -> None:
        """Add a row for each dataset of a phase."""
        # At least 1: a plan of empty datasets still has a table.
        all_tokens = max(1, int(facts.tokens.sum()))
        for number, entry in enumerate(plan.entries):
            tokens = int(facts.tokens[number])
            visual = facts.visual_tokens[number] / max(1, tokens)
            self.datasets.add_row(
                phase,
                entry.name,
                entry.over_length,
                f"{facts.samples[number]:,}",
                f"{tokens:,}",
                f"{tokens / all_tokens:.1%}",
                f"{visual:.0%}",
                *left_out_cells(entry),
            )

    def show(self) -> None:
        """Print both."""
        # A pipe has no width; 140 columns hold the tables without breaking their cells.
        console = PlainConsole(width=None if sys.stdout.isatty() else 140)
        console.print(self.phases)
        console.print(self.datasets)


def left_out_cells(entry: "MixtureEntry") -> tuple[str, str]:
    """Return the samples and tokens that no policy can fit.

    They are of the whole dataset, while the other columns are about the planned steps.
    """
    lost = entry.parts.lost_tokens
    whole = int(entry.parts.lengths["tokens"].sum())
    samples = f"{entry.parts.dropped:,} of {entry.size:,}"
    return samples, f"{lost:,} ({lost / max(1, whole):.1%})"
