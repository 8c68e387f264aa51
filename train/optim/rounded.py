"""AdamW with moments in bf16: half of their memory and of their bytes in checkpoints."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visionloom.model.sharding import cuts
from visionloom.parallel.topology import Topology
from visionloom.train.optim.adamw import GroupStepAdamW
from visionloom.train.optim.moments import TensorPlace, adamw_bf16_


class RoundedAdamW(GroupStepAdamW):
    """AdamW whose moments are rounded to bf16 after each update: to the nearest, or stochastically where places are known."""

    moment_dtype = torch.bfloat16
    places: Mapping[Tensor, tuple[TensorPlace, int]] = {}
    """Where each stretch is in its whole tensor, and the tensor's key: those of stochastic rounding."""

    def update_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient."""
        with_gradient = [each for each in group["params"] if each.grad is not None]
        if not with_gradient:
            return
        group["step"] = done = int(group.get("step") or 0) + 1
        beta1, beta2 = group["betas"]
        factors = [
            beta1,
            beta2,
            group["eps"],
            1.0 - group["lr"] * group["weight_decay"],
            group["lr"] / (1.0 - beta1**done),
            1.0 / math.sqrt(1.0 - beta2**done),
        ]
        for parameter in with_gradient:
            place, key = self.places.get(parameter, (None, 0))
            moments = self.moments_of(parameter, group)
            # A step's own key: the same numbers in each would always round alike.
            of_step = zlib.crc32(f"{key} {done}".encode())
            adamw_bf16_(parameter, parameter.grad, moments, factors, place, of_step)


def place_of(name: str, parameter: Any, begin: int, topology: Topology) -> TensorPlace:
    """Return where a stretch of a parameter is in the whole tensor, which ranks cut along one dim, and experts along the first.

    Args:
        name: canonical.
        parameter: of this rank.
        begin: first number of the stretch in the flattened parameter.
        topology: says how the parameter is cut.
    """
    shape = list(parameter.shape)
    run = distance = count = parameter.numel()
    first = 0
    for cut in reversed(cuts(name, parameter, topology)):
        dim = cut.dim
        if cut.halves:
            # Each half is cut for itself: they are a dim of their own.
            shape, dim = [2, shape[0] // 2, *shape[1:]], 1
        if dim == 0:
            first += cut.rank * count * distance // run
        else:
            run = math.prod(shape[dim:])
            distance = run * cut.size
            first += cut.rank * run
    return TensorPlace(begin, run, distance, first)
