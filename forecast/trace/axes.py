"""Name the axes of process groups, and read what a collective moves from its arguments."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from visionloom.forecast.trace.operations import tensors_in
from visionloom.parallel.topology import Topology

WORLD = "world"
GROUPS = {
    "tp": "tensor",
    "cp": "context",
    "pp": "pipeline",
    "dp": "data",
    "dp_cp": "data x context",
    "tp_cp": "tensor x context",
    "ep": "expert",
    "expt_tp": "expert tensor",
    "tp_ep": "expert tensor x expert",
    "expt_dp": "expert data",
    "tp_dp_cp": "stage",
    "embd": "embedding",
}
"""Names of Megatron-core's groups; of two groups of the same ranks the first gives the name."""
NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "send": "send",
    "recv_": "receive",
    "barrier": "barrier",
}
"""Names of collectives by those of torch's operators."""


class Axes:
    """The groups of one rank, by their own names and by their ranks."""

    def __init__(self, topology: Topology) -> None:
        self.ranks: dict[str, tuple[int, ...]] = {}
        self._by_group: dict[str, str] = {}
        self._by_ranks = {tuple(range(topology.world_size)): WORLD}
        for attribute, name in GROUPS.items():
            group = getattr(topology.groups, attribute, None)
            if group is not None:
                self._by_group.setdefault(group.group_name, name)
                self._by_ranks.setdefault(ranks_of(group), name)

    def name(self, group: Any) -> str:
        """Return the axis of a process group, and remember its ranks."""
        ranks = ranks_of(group)
        name = self._by_group.get(group.group_name) or self._by_ranks.get(ranks)
        # Groups that Megatron-core keeps for itself.
        name = name or f"ranks {', '.join(map(str, ranks))}"
        self.ranks[name] = ranks
        return name


def ranks_of(group: Any) -> tuple[int, ...]:
    """Return the ranks of a process group, among all of the run."""
    return tuple(sorted(dist.get_process_group_ranks(group)))


def group_in(args: Sequence[Any]) -> Any:
    """Return the process group among the arguments of a c10d operator."""
    for value in args:
        if "ProcessGroup" in str(getattr(value, "_type", lambda: "")()):
            return dist.ProcessGroup.unbox(value)
    raise AssertionError("every collective has a group")


def moved_bytes(args: Sequence[Any]) -> int:
    """Return the bytes of a collective: the whole that is gathered, scattered or exchanged, or what is sent or reduced."""
    sides = [sum(tensor.nbytes for tensor in tensors_in(value)) for value in args]
    return max(sides, default=0)
