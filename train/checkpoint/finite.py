"""Refuse weights that are no numbers: they end a run at the first step, and nobody would know why."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.common.text import one_line
from visionloom.parallel.topology import Topology

NAMED = 4
"""Tensors that an error names; the others are counted."""


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither NaN nor infinite numbers.

    A sum costs no memory and is finite for all usual weights; only where it is not are the numbers looked at one by one.
    """
    if not tensor.is_floating_point():
        return True
    total = tensor.sum(dtype=torch.float32)
    if bool(torch.isfinite(total)):
        return True
    return bool(torch.isfinite(tensor).all())


def require_finite(tensors: Iterable[tuple[str, Tensor]], source: str, topology: Topology) -> None:
    """Refuse weights that are no numbers; all ranks call it together, each with its own parts.

    Args:
        tensors: names and what this rank has read.
        source: where they come from, as the error names it: `init.huggingface=DIR`.
        topology: whose ranks are asked.

    Raises:
        UserError: on all ranks, naming the first tensors.
    """
    wrong = [name for name, tensor in tensors if not is_finite(tensor)]
    refuse_named(wrong, source, topology)


def refuse_named(wrong: list[str], source: str, topology: Topology) -> None:
    """Refuse weights as `require_finite` does, by the names of tensors that this rank has seen to be wrong."""
    gathered: list[list[str]] = [[] for _ in range(topology.world_size)]
    dist.all_gather_object(gathered, wrong)
    # Ranks that hold the same tensor name it each.
    names = sorted({name for part in gathered for name in part})
    if names:
        raise UserError(not_finite(source, names))


def not_finite(source: str, names: list[str]) -> str:
    """Return the error for tensors with NaN or infinite numbers."""
    listed = one_line(", ".join(names[:NAMED]))
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"{source} has NaN or infinite numbers in {listed}{more}:"
        " take weights from before training diverged"
    )
