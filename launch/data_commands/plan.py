"""`data.py plan WORDS`: what the phases of a run will train on, from lengths alone: fill, losses, tokens, balance, time."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from visionloom.common.errors import UserError
from visionloom.common.screen import PlainConsole
from visionloom.launch.data_commands.progress import bars

if TYPE_CHECKING:
    from rich.table import Table

    from visionloom.data.plan.facts import PlanFacts
    from visionloom.data.plan.plan import Plan
    from visionloom.train.config import RunConfig

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
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        help="that count lengths (default: all cores)",
    )
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
    check_paths(config)
    phases, datasets = _tables()
    for name in _phases(config, options.phase):
        phase = config.phases[name]
        layout = phase.parallel or config.parallel
        ranks = options.data_parallel or layout.data_parallel_size(world)
        # One process needs no other beside it.
        plan = plan_phase(config, name, options.processes if options.processes > 1 else 0)
        steps = min(options.steps, phase.total_steps)
        facts = facts_of(plan, steps, ranks, phase.micro_batch)
        phases.add_row(*_phase_cells(name, facts))
        _add_datasets(datasets, name, plan, facts)
    console = PlainConsole(width=None if sys.stdout.isatty() else 140)
    console.print(phases)
    console.print(datasets)


def plan_phase(config: "RunConfig", name: str, processes: int = 0) -> "Plan":
    """Return the plan of a phase, as a run begins it; `processes` count lengths that are not counted yet."""
    from visionloom.data.encode.tokenizer import Tokenizer
    from visionloom.data.plan.open import dataset_weights, open_datasets, open_plan
    from visionloom.data.plan.resumable import CountingHelp
    from visionloom.launch.data_commands.lengths import report_to
    from visionloom.train.stream_options import stream_options

    options = stream_options(config, name)
    names = list(dataset_weights(options.data, options.mixture))
    tokenizer = Tokenizer(options.data.tokenizer)
    with bars() as progress:
        helpers = CountingHelp(processes, report_to(progress))
        datasets = open_datasets(options.data, names, tokenizer, helpers)
        return open_plan(options, datasets)


def _phases(config: "RunConfig", wanted: str | None) -> list[str]:
    if wanted is None:
        return list(config.phases)
    if wanted not in config.phases:
        raise UserError(
            f"--phase {wanted} is not in the recipe: use one of {', '.join(config.phases)}"
        )
    return [wanted]


def _tables() -> "tuple[Table, Table]":
    from rich.table import Table

    phases = Table(
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
    datasets = Table(
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
    return phases, datasets


def _phase_cells(name: str, facts: "PlanFacts") -> list[str]:
    return [
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
    ]


def _add_datasets(table: "Table", name: str, plan: "Plan", facts: "PlanFacts") -> None:
    all_tokens = max(1, int(facts.tokens.sum()))
    for number, entry in enumerate(plan.entries):
        tokens = int(facts.tokens[number])
        visual = facts.visual_tokens[number] / max(1, tokens)
        # Of the whole dataset, while the other columns are about the planned steps.
        lost, whole = entry.parts.lost_tokens, int(entry.parts.lengths["tokens"].sum())
        table.add_row(
            name,
            entry.name,
            entry.over_length,
            f"{facts.samples[number]:,}",
            f"{tokens:,}",
            f"{tokens / all_tokens:.1%}",
            f"{visual:.0%}",
            f"{entry.parts.dropped:,} of {entry.size:,}",
            f"{lost:,} ({lost / max(1, whole):.1%})",
        )
