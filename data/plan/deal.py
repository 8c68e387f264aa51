"""Who does what: packs dealt to ranks and micro-batches by cost, pictures to the ranks that encode them. Imports no torch."""

import heapq
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.common.errors import UserError

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
        """Return the cost of each row of int64 [..., 4]: tokens, token pairs, patches, patch pairs."""
        return self.by_count(work).sum(-1)

    def by_count(self, work: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how much of the cost each of the four counts of `of` brings, float64 [..., 4]."""
        return work * np.array([self.token, self.token_pair, self.patch, self.patch_pair])


@dataclass(frozen=True, slots=True)
class PlannedPack:
    """Samples that share a pack, as (dataset number, sample index, part), and the pack's cost."""

    places: tuple[tuple[int, int, int], ...]
    cost: float


def deal[Pack: PlannedPack](
    packs: list[Pack], data_size: int, micro_batch: int
) -> list[list[list[Pack]]]:
    """Deal the packs of a step to data-parallel ranks and micro-batches, balanced by cost: [rank][micro-batch][pack].

    Costliest first to the lightest rank that has room (longest processing time first), then exchanges with the heaviest
    rank while they help, then the same inside each rank; micro-batches come costliest first, so that the k-th ones of all
    ranks are alike and a pipeline stays level.

    Raises:
        UserError: if the packs cannot be dealt evenly.
    """
    if len(packs) % (data_size * micro_batch):
        raise UserError(
            f"global_batch={len(packs)} packs cannot be dealt to {data_size} data-parallel ranks x micro_batch {micro_batch}:"
            f" make it a multiple of {data_size * micro_batch}"
        )
    ranks = _PackGroups(packs, data_size)
    if data_size > 1:
        ranks.level()
    dealt = []
    for mine in ranks.costliest_first():
        dealt.append(_PackGroups(mine, len(mine) // micro_batch).costliest_first())
    return dealt


class _PackGroups[Pack: PlannedPack]:
    """Groups of equally many packs, and the load of each."""

    def __init__(self, packs: list[Pack], count: int) -> None:
        self.room = len(packs) // count
        self.groups: list[list[Pack]] = [[] for _ in range(count)]
        self._fill(packs)
        self.loads = [sum(pack.cost for pack in group) for group in self.groups]

    def _fill(self, packs: list[Pack]) -> None:
        """Deal the packs, costliest first to the lightest group that has room."""
        lightest = [(0.0, number) for number in range(len(self.groups))]
        # costliest first leaves the small ones to level the loads
        for pack in sorted(packs, key=lambda pack: -pack.cost):
            load, number = heapq.heappop(lightest)
            self.groups[number].append(pack)
            if len(self.groups[number]) < self.room:
                # a full group takes no more
                heapq.heappush(lightest, (load + pack.cost, number))

    def costliest_first(self) -> list[list[Pack]]:
        """Return the groups, the one with the highest load first."""
        order = sorted(range(len(self.groups)), key=lambda number: -self.loads[number])
        return [self.groups[number] for number in order]

    def level(self) -> None:
        """Exchange packs of the heaviest group while that makes it lighter."""
        swaps = _SWAPS
        # with one pack in a group an exchange only renames the groups
        while swaps and self.room > 1 and self._exchange():
            swaps -= 1

    def _exchange(self) -> bool:
        """Trade one pack of the heaviest group for a lighter one elsewhere.

        Of all trades the one after which the heavier of the two is lightest; return False if no
        trade makes it lighter.
        """
        loads = self.loads
        heaviest = max(range(len(loads)), key=loads.__getitem__)
        gain, after = self._trades_of(heaviest)
        best = np.unravel_index(int(np.argmin(after)), after.shape)
        # what rounding errors alone gain is no gain
        if after[best] >= loads[heaviest] * (1 - 1e-9):
            return False
        mine, other, theirs = (int(index) for index in best)
        self._trade((heaviest, mine), (other, theirs), float(gain[best]))
        return True

    def _trades_of(self, group: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what each trade moves out of a group, and the larger of the two loads after it.

        Both float64 [pack of the group, other group, its pack].
        """
        costs = np.array([[pack.cost for pack in packs] for packs in self.groups])
        gain = costs[group][:, None, None] - costs[None]
        others = np.array(self.loads)[None, :, None]
        after = np.maximum(self.loads[group] - gain, others + gain)
        # a group does not trade with itself
        after[:, group] = np.inf
        return gain, after

    def _trade(self, ours: tuple[int, int], theirs: tuple[int, int], moved: float) -> None:
        """Swap two packs, each named by (group, place in it); a load moves to the second group."""
        (heavy, taken), (light, given) = ours, theirs
        first, second = self.groups[heavy], self.groups[light]
        first[taken], second[given] = second[given], first[taken]
        self.loads[heavy] -= moved
        self.loads[light] += moved


@dataclass(frozen=True, slots=True)
class DealtUnits:
    """n units, each a picture or a run of a video's frames, in token order, and who encodes them."""

    units: NDArray[np.int32]
    """[n, 3] patches in time, height and width."""
    media: NDArray[np.int32]
    """[n] number of the picture or video that the unit belongs to."""
    first: NDArray[np.int32]
    """[n] temporal patch of it at which the unit begins."""
    owners: NDArray[np.int32]
    """[n] encoder rank."""

    def runs_of(self, units: list[int], first_medium: int) -> list[tuple[int, int, int]]:
        """Return the picture or video of each of these units, first temporal patch and count.

        Pictures and videos are numbered from `first_medium`.
        """
        media = (self.media[units] - first_medium).tolist()
        first, counts = self.first[units].tolist(), self.units[units, 0].tolist()
        return list(zip(media, first, counts, strict=True))


def deal_units(grids: NDArray[np.int32], ranks: int) -> DealtUnits:
    """Cut videos into runs of frames and deal images and runs to the ranks that encode them, by patch count.

    Frames of a video never attend to each other, so a run is encoded as a video of its own. Largest first to the rank with
    the fewest patches; ties go to the first, so every rank works out the same.

    Args:
        grids: int32 [g, 3], patches in time, height and width of each picture and video, in token order.
        ranks: how many share the encoding.
    """
    grids = np.asarray(grids, np.int32).reshape(-1, 3)
    sizes = grids.prod(1, dtype=np.int64)
    fair = max(1.0, sizes.sum() / ranks)
    # runs of at most half a fair share, so that the last ones can still level the loads
    most = np.minimum(ranks, grids[:, 0])
    runs = np.minimum(most, np.ceil(2 * sizes / fair)).astype(np.int64)

    media = np.repeat(np.arange(len(grids), dtype=np.int32), runs)
    within = np.arange(len(media)) - (np.cumsum(runs) - runs)[media]
    time, height, width = grids[media].T
    # runs differ by at most one temporal patch
    first = within * time // runs[media]
    frames = (within + 1) * time // runs[media] - first
    units = np.stack([frames, height, width], axis=1).astype(np.int32)
    owners = _owners(units.prod(1, dtype=np.int64), ranks)
    return DealtUnits(units, media, first.astype(np.int32), owners)


def _owners(sizes: NDArray[np.int64], ranks: int) -> NDArray[np.int32]:
    """Deal units of these patch counts (int64 [n]) to ranks: int32 [n], the rank of each."""
    owners = np.zeros(len(sizes), np.int32)
    loads = [0] * ranks
    # stable, so that ranks agree on equal sizes
    for unit in np.argsort(-sizes, kind="stable").tolist():
        lightest = loads.index(min(loads))
        owners[unit] = lightest
        loads[lightest] += int(sizes[unit])
    return owners
