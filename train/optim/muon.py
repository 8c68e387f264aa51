"""Muon for the matrices of the layers, exact in every layout, beside AdamW for all other parameters.

The update of a matrix is its momentum with all singular values brought near 1, by five steps of Newton and Schulz, which need the
whole matrix. Momentum stays where the distributed optimizer has it, in flat stretches over the ranks. A round takes as many whole
parameters (matrices.py) as a stage has ranks, of about one size: the stretches of each go to one rank by one exchange, that rank
computes, and a second exchange brings all stretches of the result back. So no matrix is computed twice, whatever the layout, and a
rank holds one whole parameter at a time.

Source: Muon (kellerjordan.github.io/posts/muon), its scale Muon is Scalable for LLM Training (arXiv 2502.16982) section 2.2;
reference implementation: torch.optim.Muon with adjust_lr_fn="match_rms_adamw".
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.train.optim.adamw import GroupStepAdamW
from visionloom.train.optim.matrices import Holder, WholeParameter

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial whose slope at zero is steepest."""
STEPS: Final = 5
EPSILON: Final = 1e-7
"""Least norm that a matrix is divided by."""
RMS: Final = 0.2
"""Root mean square of an update before the learning rate, as AdamW's are: its learning rates stay usable."""


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices [b, m, n] with their singular values brought to between about 0.7 and 1.2, in their dtype."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    # The Gram matrix of the shorter side is the smaller one.
    x = matrices.mT if is_tall else matrices
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    x = x / norms.clamp_min(EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x


def direction(matrices: Tensor) -> Tensor:
    """Return the step of matrices [b, m, n] for a learning rate of 1."""
    # Orthogonal rows or columns have a root mean square of 1 / sqrt(longer side).
    longer = max(matrices.shape[1:])
    return orthogonalize(matrices).mul_(RMS * math.sqrt(longer))


def is_muon(group: dict[str, Any]) -> bool:
    """Return whether Muon updates the parameters of a group: only it has one momentum."""
    return "momentum" in group


class MuonAdamW(GroupStepAdamW):
    """Muon for the groups with a `momentum`, AdamW for the others; `join_stage` comes before the first step."""

    wholes: Sequence[WholeParameter] = ()
    stage: "Stage"

    def join_stage(self, wholes: Sequence[WholeParameter], stage: "Stage") -> None:
        """Set the ranks of this rank's pipeline stage and their whole parameters, alike on each."""
        self.wholes, self.stage = wholes, stage

    def moment_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of moments: Muon has one, of another name than AdamW's, which cannot continue with it."""
        return ("momentum",) if is_muon(group) else super().moment_names(group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter; all ranks of the stage call it together."""
        super().step()
        groups: dict[Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            if is_muon(group):
                groups |= dict.fromkeys(group["params"], group)
        for wholes in batched(self.wholes, self.stage.ranks):
            self._update(wholes, groups)

    def update_group(self, group: dict[str, Any]) -> None:
        """Update the parameters of a group by AdamW, or only count the update where Muon makes it."""
        if is_muon(group):
            group["step"] = int(group.get("step") or 0) + 1
        else:
            super().update_group(group)

    def _update(
        self, wholes: Sequence[WholeParameter], groups: dict[Tensor, dict[str, Any]]
    ) -> None:
        """Update the matrices of a round."""
        momenta = {}
        for number, whole in enumerate(wholes):
            if whole.shard is not None:
                momenta[number] = self._advanced(whole.shard, groups[whole.shard])
        steps = directions(wholes, momenta, self.stage)

        for number, step in steps.items():
            shard = wholes[number].shard
            assert shard is not None
            group = groups[shard]
            shard.mul_(1 - group["lr"] * group["weight_decay"])
            shard.add_(step, alpha=-group["lr"])

    def _advanced(self, shard: Tensor, group: dict[str, Any]) -> Tensor:
        """Advance the momentum of a stretch by its gradient; return it a step ahead, as Nesterov has it [n]."""
        (momentum,) = self.moments_of(shard, group)
        assert shard.grad is not None
        momentum.lerp_(shard.grad, 1 - group["momentum"])
        return shard.grad.lerp(momentum, group["momentum"]).to(self.stage.dtype)


@dataclass(frozen=True)
class Stage:
    """The ranks of a pipeline stage, which exchange stretches."""

    group: Any
    device: torch.device

    @property
    def rank(self) -> int:
        """Return the place of this rank."""
        return int(self.group.rank())

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return int(self.group.size())

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype in which matrices travel and are multiplied.

        bf16 as in the published runs: the polynomial moves singular values by far more than bf16 rounds them. A CPU has fp32, in
        which layouts can be compared.
        """
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def exchange(self, pieces: list[Tensor], sent: list[int], received: list[int]) -> Tensor:
        """Return what the ranks send to this one, end to end in their order.

        Args:
            pieces: for the ranks in their order.
            sent: numbers for each of the first ranks.
            received: numbers from each of the first ranks.
        """
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        leaving_numbers = torch.cat(pieces) if pieces else empty
        if self.ranks == 1:
            return leaving_numbers
        arrived = empty.new_empty(sum(received))
        others = [0] * self.ranks
        arriving, leaving = ((each + others)[: self.ranks] for each in (received, sent))
        dist.all_to_all_single(arrived, leaving_numbers, arriving, leaving, group=self.group)
        return arrived


def directions(
    wholes: Sequence[WholeParameter], momenta: dict[int, Tensor], stage: Stage
) -> dict[int, Tensor]:
    """Return the steps for a learning rate of 1 of this rank's stretches [n], by the parameter's number.

    Args:
        wholes: of a round, at most one a rank: that of number i is computed by rank i.
        momenta: of this rank's stretches [n], by the parameter's number; of copies only one is sent.
        stage: the ranks.
    """
    rank = stage.rank
    own = wholes[rank] if rank < len(wholes) else None
    sent = [sizes_by_rank(whole.senders, stage.ranks)[rank] for whole in wholes]
    pieces = [momenta[number] for number, size in enumerate(sent) if size]
    arriving = sizes_by_rank(own.senders, stage.ranks) if own else []
    numbers = stage.exchange(pieces, sent, arriving)

    results: list[Tensor] = []
    if own:
        parts = steps_of(own, numbers)
        results = [parts[holder.part][holder.begin : holder.end] for holder in own.holders]
    leaving = sizes_by_rank(own.holders, stage.ranks) if own else []
    back = [sizes_by_rank(whole.holders, stage.ranks)[rank] for whole in wholes]
    steps = stage.exchange(results, leaving, back).split(back)
    return {number: steps[number] for number in momenta}


def sizes_by_rank(holders: Iterable[Holder], ranks: int) -> list[int]:
    """Return how many numbers each rank of a stage has of a whole parameter."""
    sizes = [0] * ranks
    for holder in holders:
        sizes[holder.rank] = holder.size
    return sizes


def steps_of(whole: WholeParameter, numbers: Tensor) -> list[Tensor]:
    """Return the steps of the flattened parts [n], from the momenta that its senders sent, end to end."""
    by_part: list[list[Tensor]] = [[] for _ in range(whole.parts)]
    stretches = numbers.split([holder.size for holder in whole.senders])
    for holder, stretch in zip(whole.senders, stretches, strict=True):
        by_part[holder.part].append(stretch)
    matrices = whole.fusion.join([torch.cat(stretches) for stretches in by_part])
    return whole.fusion.part([direction(each) for each in matrices], whole.parts)
