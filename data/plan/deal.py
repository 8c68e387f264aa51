"""Who does what: packs dealt to ranks and micro-batches by cost, pictures to the ranks that encode them. Imports no torch."""

import heapq
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.common.errors import UserError

Pieces = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]
_SWAPS: Final = 64
"""Exchanges tried at most between the heaviest rank and the others."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Work of a pack as a sum of four counts times these factors; it balances ranks and never changes a step's content.

    The defaults are one text token's linear layers as the unit: 2lh operations of attention against 24h^2 in a causal layer
    (h = 2048); vision layers (h = 1152) at a tenth, with 4ph against 24h^2. A run computes its own from its model.
    """

    token: float = 1.0
    token_pair: float = 1.0 / (12 * 2048)
    """For each pair of tokens of a sample: the sum of squared lengths."""
    patch: float = 0.1
    patch_pair: float = 0.1 / (6 * 1152)
    """For each pair of patches of an image or frame: the sum of squared patch counts."""

    def of(self, work: NDArray[np.int64]) -> NDArray[np.float64]:
        """Cost of each row of int64 [..., 4]: tokens, token pairs, patches, patch pairs."""
        return work @ np.array([self.token, self.token_pair, self.patch, self.patch_pair])


@dataclass(frozen=True, slots=True)
class PlannedPack:
    """Samples that share a pack, as (dataset number, sample index, part), and the pack's cost."""

    places: tuple[tuple[int, int, int], ...]
    cost: float


def deal(packs: list[PlannedPack], dp_size: int, micro_batch: int) -> list[list[list[PlannedPack]]]:
    """Deal the packs of a step to data-parallel ranks and micro-batches, balanced by cost: [rank][micro-batch][pack].

    Costliest first to the lightest rank that has room (longest processing time first), then exchanges with the heaviest
    rank while they help, then the same inside each rank; micro-batches come costliest first, so that the k-th ones of all
    ranks are alike and a pipeline stays level. Raises UserError if the packs cannot be dealt evenly.
    """
    if len(packs) % (dp_size * micro_batch):
        raise UserError(
            f"global_batch={len(packs)} packs cannot be dealt to {dp_size} data-parallel ranks x micro_batch {micro_batch}:"
            f" make it a multiple of {dp_size * micro_batch}"
        )
    ranks = _balance(packs, dp_size, _SWAPS if dp_size > 1 else 0)
    return [_balance(mine, len(mine) // micro_batch, 0) for mine in ranks]


def _balance(packs: list[PlannedPack], groups: int, swaps: int) -> list[list[PlannedPack]]:
    """Groups of equal size, costliest group first."""
    room = len(packs) // groups
    dealt: list[list[PlannedPack]] = [[] for _ in range(groups)]
    lightest = [(0.0, group) for group in range(groups)]
    for pack in sorted(packs, key=lambda pack: -pack.cost):
        load, group = heapq.heappop(lightest)
        dealt[group].append(pack)
        if len(dealt[group]) < room:
            heapq.heappush(lightest, (load + pack.cost, group))
    loads = [sum(pack.cost for pack in group) for group in dealt]
    while swaps and room > 1 and _exchange(dealt, loads):
        swaps -= 1
    return [dealt[g] for g in sorted(range(groups), key=lambda g: -loads[g])]


def _exchange(dealt: list[list[PlannedPack]], loads: list[float]) -> bool:
    """Trade one pack of the heaviest group for a lighter one elsewhere so that the heavier of the two gets lightest."""
    heaviest = max(range(len(loads)), key=lambda g: loads[g])
    costs = np.array([[pack.cost for pack in group] for group in dealt])
    gain = costs[heaviest][:, None, None] - costs[None]
    after = np.maximum(loads[heaviest] - gain, np.array(loads)[None, :, None] + gain)
    after[:, heaviest] = np.inf
    mine, other, theirs = (
        int(part) for part in np.unravel_index(int(np.argmin(after)), after.shape)
    )
    if after[mine, other, theirs] >= loads[heaviest] * (1 - 1e-9):
        return False
    moved = float(gain[mine, other, theirs])
    dealt[heaviest][mine], dealt[other][theirs] = dealt[other][theirs], dealt[heaviest][mine]
    loads[heaviest] -= moved
    loads[other] += moved
    return True


def deal_units(grids: NDArray[np.int32], ranks: int) -> Pieces:
    """Cut videos into runs of frames and deal images and runs to the ranks that encode them, by patch count.

    Frames of a video never attend to each other, so a run is encoded as a video of its own. Largest first to the rank with
    the fewest patches; ties go to the first, so every rank works out the same.

    Args:
        grids: int32 [g, 3], patches in time, height and width of each picture and video, in token order.
        ranks: how many share the encoding.

    Returns:
        units int32 [n, 3] in token order; and, each int32 [n], the number of the picture or video that a unit belongs to,
        the temporal patch at which it begins, and its rank.
    """
    grids = np.asarray(grids, np.int32).reshape(-1, 3)
    sizes = grids.prod(1, dtype=np.int64)
    fair = max(1.0, sizes.sum() / ranks)
    runs = np.minimum(np.minimum(ranks, grids[:, 0]), np.ceil(2 * sizes / fair)).astype(np.int64)
    media = np.repeat(np.arange(len(grids), dtype=np.int32), runs)
    within = np.arange(len(media)) - (np.cumsum(runs) - runs)[media]
    first = within * grids[media, 0] // runs[media]
    frames = (within + 1) * grids[media, 0] // runs[media] - first
    units = np.stack([frames, grids[media, 1], grids[media, 2]], axis=1).astype(np.int32)
    return units, media, first.astype(np.int32), _owners(units.prod(1, dtype=np.int64), ranks)


def _owners(sizes: NDArray[np.int64], ranks: int) -> NDArray[np.int32]:
    owners = np.zeros(len(sizes), np.int32)
    loads = [0] * ranks
    for unit in np.argsort(-sizes, kind="stable").tolist():
        lightest = loads.index(min(loads))
        owners[unit] = lightest
        loads[lightest] += int(sizes[unit])
    return owners
