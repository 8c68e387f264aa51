"""`run.plan=true`: a plan before a run starts, which refuses what cannot fit.

The planner is a process of its own, since it replaces parts of torch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from visionloom.common.command import environment_alone
from visionloom.common.errors import UserError, unknown
from visionloom.common.ranks import ranks_here
from visionloom.common.text import say
from visionloom.forecast.machine import GIB, machine, machine_names
from visionloom.forecast.show.document import JSON
from visionloom.launch import environment
from visionloom.launch.guarding.exit import CANNOT_RUN
from visionloom.train.config import RunConfig, RunSection

ON_CPUS: Final = "h100"
"""Machine of a plan for a run on CPUs: its memory is replaced, and of its times nothing is shown."""
PLANNER: Final = Path(__file__).parents[1] / "plan.py"
QUERY: Final = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")


def check_plan(config: RunConfig, argv: Sequence[str]) -> None:
    """Plan a run that asks for it, and say what is predicted; ranks other than 0 leave that to it.

    Args:
        config: of the run.
        argv: the command line that it was composed of.

    Raises:
        UserError: one line with what is too large and the cure, or why there is no plan.
    """
    if not config.run.plan or os.environ.get("RANK", "0") != "0":
        return
    say("planning the run before it starts (run.plan=true)")
    on_gpus = environment.trains_on_gpus(config.run.device)
    plan = fitting_plan([*argv, *words_of_machine(config.run)], "run.plan")
    for phase in plan["phases"]:
        say(f"{prediction(plan, phase, on_gpus)} ({plan['notice']})")


def prediction(plan: dict[str, Any], phase: dict[str, Any], timed: bool) -> str:
    """Return what a plan says about a phase, in one line; `timed`: with its times."""
    peak = max(rank["peak_bytes"] for rank in phase["ranks"]) / GIB
    line = f"plan of {phase['phase']}: {peak:.1f} of {plan['gpu_bytes'] / GIB:.1f} GiB"
    if not timed:
        return line
    speed = phase["tokens_per_second"]
    return f"{line}, {phase['step_seconds']:.2f} s a step, {speed:,.0f} tokens/s"


def words_of_machine(run: RunSection) -> list[str]:
    """Return the words that tell the planner of the ranks, and of what each has."""
    on_gpus = environment.trains_on_gpus(run.device)
    words = words_of_card(run.gpu) if on_gpus else words_of_memory(run.precision)
    return [*words, f"world={environment.world_size()}"]


def words_of_card(chosen: str) -> list[str]:
    """Return the words that tell the planner of this machine's card.

    Args:
        chosen: run.gpu; empty: by the name that the driver gives.

    Raises:
        UserError: if no file of recipes/gpu is about it.
    """
    names = machine_names()
    if chosen and chosen not in names:
        raise UserError(unknown("run.gpu", chosen, names))
    card, memory = card_here()
    fitting = chosen or only_file_about(card)
    if not fitting:
        raise UserError(
            f"run.plan=true: no file of recipes/gpu is about {card}: say which comes near, run.gpu=NAME, NAME one of"
            f" {', '.join(names)}, or start without a plan, run.plan=false"
        )
    return [f"gpu={fitting}", *memory]


def card_here() -> tuple[str, list[str]]:
    """Return the name of this machine's first GPU, and the word that says its memory.

    Without the driver's tool there is no such word: its memory is as the file says.
    """
    try:
        answer = subprocess.run(QUERY, capture_output=True, text=True, timeout=60, check=True)
        name, _, mebibytes = answer.stdout.partition("\n")[0].rpartition(",")
        return name, [f"memory={int(mebibytes) / 1024:.2f}"]
    except (OSError, subprocess.SubprocessError, ValueError):
        return "a card whose name nvidia-smi does not tell", []


def only_file_about(card: str) -> str:
    """Return the name of the only file of recipes/gpu that is about a card; empty if there is none, or more than one."""
    files = [name for name in machine_names() if is_of(name, card)]
    return files[0] if len(files) == 1 else ""


def is_of(known: str, card: str) -> bool:
    """Return whether a file is about a card: `a100_80` is about `NVIDIA A100-SXM4-80GB`."""
    words = re.findall(r"[a-z]+\d+|\d+", card.lower())
    return set(known.split("_")) <= set(words)


def words_of_memory(precision: str) -> list[str]:
    """Return the words that tell the planner what a rank on CPUs has, its share of the machine's memory, and its precision."""
    share = environment.memory_bytes() / ranks_here() / GIB
    # What a GPU's driver keeps for itself is taken off again.
    words = [f"gpu={ON_CPUS}", f"memory={share + machine(ON_CPUS).reserved_gib:.3f}"]
    # The planner takes `auto` for what it is on a GPU.
    return [*words, "run.precision=fp32"] if precision == "auto" else words


def fitting_plan(words: Sequence[str], option: str) -> dict[str, Any]:
    """Return the plan of a run that fits; UserError with what is too large and the cure, or why there is no plan.

    `option`: the one that asks for the plan, and without which there is none.
    """
    plan = plan_of(words, option)
    if not plan["can_run"]:
        faults = "; ".join(plan["faults"])
        raise UserError(f"{option}=true: {faults}; or start without a plan, {option}=false")
    return plan


def plan_of(words: Sequence[str], option: str = "run.plan") -> dict[str, Any]:
    """Run the planner and return its plan.json; UserError with its last line if it made none."""
    variables = environment_alone()
    # It takes no GPU that the run is about to use.
    variables["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(PLANNER), *words, f"out={folder}"]
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, errors="replace"
        )
        file = Path(folder) / JSON
        if done.returncode in (0, CANNOT_RUN) and file.is_file():
            plan: dict[str, Any] = json.loads(file.read_text())
            return plan
    lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
    cause = lines[-1].removeprefix("error: ")
    raise UserError(
        f"{option}=true: no plan could be made: {cause}: correct that, or start without a plan, {option}=false"
    )
