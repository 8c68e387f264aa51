"""Measure the ranks of a run before its first step, show the table, and leave it in the run's folder as preflight.json."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from visionloom.common.atomic import replacing
from visionloom.common.pulse import current as pulse
from visionloom.common.screen import PlainConsole
from visionloom.common.text import say, warn
from visionloom.forecast.machine import Machine, machine
from visionloom.launch.plan_commands.first import only_file_about
from visionloom.launch.preflight.facts import RankFacts
from visionloom.launch.preflight.run import Preflight
from visionloom.launch.preflight.table import rank_table, warnings
from visionloom.parallel.topology import Topology
from visionloom.train.build import model_dtype, run_folder
from visionloom.train.config import RunConfig
from visionloom.train.run import free_memory

PREFLIGHT: Final = "preflight.json"


def measure_ranks(config: RunConfig, topology: Topology) -> None:
    """Measure the ranks of a run; raises MachineError on all if one does not answer."""
    folder = run_folder(config)
    if topology.is_main:
        say("measuring the ranks before step 1, a minute at most (watch.preflight)")
    with pulse.at("preflight"):
        preflight = Preflight(topology, folder, assumed_of(config.run.gpu, topology))
        ranks = preflight.run(model_dtype(config.run.precision, topology.device))
    # What was measured with, some 2 GiB.
    free_memory(topology.device)
    if topology.is_main:
        show(ranks)
        write(ranks, folder / PREFLIGHT)


def assumed_of(chosen: str, topology: Topology) -> Machine | None:
    """Return what plans assume of this rank's card; None where no file, or more than one, is about it."""
    if topology.device.type == "cpu":
        return None
    from torch.cuda import get_device_name

    name = chosen or only_file_about(get_device_name(topology.device))
    return machine(name) if name else None


def show(ranks: Sequence[RankFacts]) -> None:
    """Print the table, and a line for each warning."""
    PlainConsole(width=None if sys.stdout.isatty() else 160).print(rank_table(ranks))
    for line in warnings(ranks):
        warn(f"warning: {line}")


def write(ranks: Sequence[RankFacts], path: Path) -> None:
    """Write what all ranks are, with the ratio of each speed to what plans assume."""
    rows = []
    for facts in ranks:
        speeds = [asdict(each) | {"ratio": each.ratio} for each in facts.speeds]
        rows.append(asdict(facts) | {"speeds": speeds})
    with replacing(path, durable=False) as file:
        file.write(json.dumps(rows, indent=1).encode())
