"""Measure all-reduces between the ranks of a machine, and between machines: first the ones, then the others."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist

from visionloom.launch.check_parts import speeds
from visionloom.launch.check_parts.results import MeasuredSpeed
from visionloom.launch.check_parts.speeds import Speeds

INSIDE: Final = "in machine"
BETWEEN: Final = "between"
"""Names of the two measurements."""
WATCHDOG: Final = timedelta(minutes=5)
"""Of NCCL, which ends the process: long after LONGEST_REDUCTION, by which this rank says what is wrong."""


def nodes_of(hosts: Sequence[str]) -> list[list[int]]:
    """Return the ranks of each machine, in the order of the machines' first ranks; `hosts`: of each rank."""
    nodes = defaultdict[str, list[int]](list)
    for rank, host in enumerate(hosts):
        nodes[host].append(rank)
    return list(nodes.values())


def rails_of(nodes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the ranks that have the same place on each machine: data ranks talk so, each by its own adapter."""
    return [list(rail) for rail in zip(*nodes, strict=False)]


def measure_links(measuring: Speeds, hosts: Sequence[str]) -> Iterator[MeasuredSpeed]:
    """Yield this rank's bus bandwidth in its machine and to others, where it has any; all ranks call it.

    Raises:
        TimeoutError: if another rank does not come.
    """
    nodes = nodes_of(hosts)
    kinds = (
        (INSIDE, "inside_gbps", nodes),
        (BETWEEN, "between_gbps", rails_of(nodes) if len(nodes) > 1 else []),
    )
    for name, option, members in kinds:
        group = open_groups(members, measuring.topology.rank)
        if group is None:
            continue
        yield replace(measuring.all_reduce(group, option), name=name)
        # Not after a TimeoutError: it would wait for the collective that hangs.
        dist.destroy_process_group(group)


def open_groups(members: Sequence[Sequence[int]], rank: int) -> Any:
    """Open a group for each list of two or more ranks, as all ranks must in one order; returns this rank's, if it has one."""
    # Gloo connects at once, and raises an error that can be told; NCCL does so in its first all-reduce.
    is_gloo = dist.get_backend() == "gloo"
    timeout = timedelta(seconds=speeds.LONGEST_REDUCTION) if is_gloo else WATCHDOG
    own = None
    for ranks in members:
        if len(ranks) == 1:
            continue
        group = dist.new_group(list(ranks), timeout=timeout)
        if rank in ranks:
            own = group
    return own
