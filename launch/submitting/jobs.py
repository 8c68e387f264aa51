"""The jobs of a submission, each composed and checked for its own number of ranks, before anything waits in a queue."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from visionloom.common.errors import UserError, unknown
from visionloom.common.text import warn
from visionloom.launch.configure import check_agreements, check_paths, compose, compose_unchecked
from visionloom.launch.plan_commands.first import fitting_plan, prediction
from visionloom.launch.submitting.words import Order
from visionloom.train.config import RunConfig

CHECKOUT: Final = Path(__file__).resolve().parents[2]
"""Not by the link that makes it a package: ranks in a container see the folder itself."""
SEED: Final = "$SEED"
"""The shell's variable with the seed of an array's task."""


@dataclass
class SubmittedJob:
    """One job of the scheduler: a run, or one phase of it."""

    config: RunConfig
    nodes: int
    phase: str = ""
    """Empty: all phases."""

    @property
    def name(self) -> str:
        """Return the job's name, as queues show it."""
        return f"{self.config.run.name}-{self.phase}" if self.phase else self.config.run.name

    def command(self, order: Order) -> str:
        """Return the program and its words for a shell; in an array with its variable SEED."""
        words = [*_program(order.own.program), *order.words]
        if self.phase:
            words.append(f"run.phase={self.phase}")
        line = shlex.join(words)
        if not order.seeds:
            return line
        name = shlex.quote(f"run.name={self.config.run.name}-seed")
        return f'{line} run.seed="{SEED}" {name}"{SEED}" run.folder={self.folder(order)}'

    def folder(self, order: Order) -> str:
        """Return the run's folder for a shell."""
        if not order.seeds:
            return shlex.quote(self.config.run.folder)
        return f'{shlex.quote(f"{self.config.run.folder}-seed")}"{SEED}"'


def _program(text: str) -> list[str]:
    """Return a program and its first arguments, ours from this checkout wherever the command was typed."""
    name, *arguments = shlex.split(text)
    ours = CHECKOUT / name
    if name.startswith("launch/") and ours.is_file():
        name = str(ours)
    return [name, *arguments]


def checked_jobs(order: Order) -> list[SubmittedJob]:
    """Compose the jobs of an order, and check all that can be checked without the ranks.

    Raises:
        UserError: one line a fault; nothing is written or submitted then.
    """
    jobs = [_job(order, phase) for phase in _phases(order)]
    # Paths inside a container are not those of this machine.
    if not order.own.container:
        check_paths(jobs[0].config)
        check_agreements(jobs[0].config)
    if order.own.plan:
        for job in jobs:
            _plan(job, order)
    return jobs


def _phases(order: Order) -> list[str]:
    """Return the phase of each job; one without a name has all."""
    # Values and ranks are checked job by job.
    config = compose_unchecked(order.words)
    if config is None:
        raise UserError(
            "--cfg and --help show a run and submit none: leave them out, or give them to launch/pretrain.py"
        )
    if "--chain" not in order.flags:
        return [""]
    phases = list(config.phases)
    if lines := [unknown("nodes", name, phases) for name in order.nodes_of if name not in phases]:
        raise UserError(*lines)
    return phases


def _job(order: Order, phase: str) -> SubmittedJob:
    """Compose a job, and check it for the number of its ranks."""
    nodes = order.nodes_of.get(phase, order.own.nodes)
    words = [*order.words, f"run.phase={phase}"] if phase else order.words
    config = compose(words, nodes * order.own.gpus_per_node)
    assert config is not None
    return SubmittedJob(config, nodes, phase)


def _plan(job: SubmittedJob, order: Order) -> None:
    """Plan a job, and say what is predicted; UserError if it does not fit."""
    own = order.own
    words = [*order.words, f"gpu={own.gpu}", f"world={job.nodes * own.gpus_per_node}"]
    if job.phase:
        words += [f"phase={job.phase}", f"run.phase={job.phase}"]
    plan = fitting_plan(words, "plan")
    for phase in plan["phases"]:
        warn(f"{prediction(plan, phase, timed=True)} ({plan['notice']})")
