"""Light packs beside the heavy ones of a step, so that ranks can be dealt even work. Pure Python on plain lists.

A sample as long as a pack costs what its attention costs, and no dealing makes it less. The other packs of its rank can be
lighter, if short samples share them: packs of a step trade samples for that, each staying as full as it is. Which packs
those are follows from the step's samples alone, in whole numbers, so that every layout and machine has the same ones.
"""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from visionloom.data.plan.best_fit import PackBudget

_PARTNERS: Final = 3
"""Light packs for a heavy one: with four packs a rank, the usual accumulation, they make up for it."""
_TRADES: Final = 10
"""Packs that one pack trades with at most: with 4, one of 240 steps at 256K stayed at 1.065 times the mean."""
_FREE: Final = 20
"""Samples, of those that fill a pack, that may be replaced for an exact fit: with 10 every second trade finds none, all
of them take twice the time."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What each sample takes up of a pack, and its cost."""

    tokens: list[int]
    """Rounded up as the pack counts them."""
    patches: list[int]
    costs: list[int]


def is_heavy(cost: int, mean: int) -> bool:
    """Return whether a pack needs light ones beside it.

    At 1.5 times the mean: at 8K and 32K no pack is so heavy, and nothing is traded.
    """
    return 2 * cost > 3 * mean


def with_light_packs(packs: list[list[int]], sizes: Sizes, budget: PackBudget) -> list[list[int]]:
    """Return the packs of a step after trades that make some light enough for the heavy ones.

    Every sample stays in one pack, and every pack within its budget.
    """
    step = _Step(packs, sizes, budget)
    step.make_light()
    return step.packs


class _Step:
    """The packs of a step while they trade."""

    def __init__(self, packs: list[list[int]], sizes: Sizes, budget: PackBudget) -> None:
        self.packs, self.sizes, self.budget = list(packs), sizes, budget
        self.costs = [self._cost(pack) for pack in packs]

    def _cost(self, pack: list[int]) -> int:
        return sum(self.sizes.costs[number] for number in pack)

    def make_light(self) -> None:
        """Give each heavy pack, the heaviest first, the lightest packs that are left, and make those as light as it needs."""
        mean = sum(self.costs) // len(self.packs)
        heavy: list[int] = []
        free: list[int] = []
        for pack, cost in enumerate(self.costs):
            (heavy if is_heavy(cost, mean) else free).append(pack)
        heavy.sort(key=self.costs.__getitem__, reverse=True)
        for pack in heavy:
            # trades have changed the order
            free.sort(key=self.costs.__getitem__)
            partners, free = free[:_PARTNERS], free[_PARTNERS:]
            # a third more than needed, for pictures and other models weigh a little otherwise
            lacking = (self.costs[pack] - mean) * 13 // 10
            for partner in partners:
                lacking -= mean - self.costs[partner]
            for partner in reversed(partners):
                lacking -= self._lighten(partner, free, lacking)

    def _lighten(self, light: int, others: list[int], wanted: int) -> int:
        """Trade a pack's costly samples for cheap ones of others until it is `wanted` lighter; return how much it is."""
        gain = 0
        # many samples are short ones
        by_count = sorted(others, key=lambda pack: -len(self.packs[pack]))
        for other in by_count[:_TRADES]:
            if gain >= wanted:
                break
            gain += self._trade(light, other)
        return gain

    def _trade(self, light: int, other: int) -> int:
        """Divide the samples of two packs anew, the cheapest for the first; return how much lighter it is."""
        both = sorted(self.packs[light] + self.packs[other], key=self._cost_of_a_token)
        lengths = [self.sizes.tokens[number] for number in both]
        most = self.budget.tokens
        # what the first leaves must fit into the second
        places = first_filling(lengths, sum(lengths) - most, most)
        cheap = [both[place] for place in places]
        taken = set(cheap)
        rest = [number for number in both if number not in taken]
        gain = self.costs[light] - self._cost(cheap)
        if not places or gain <= 0 or not (self._fits(cheap) and self._fits(rest)):
            return 0
        self.packs[light], self.packs[other] = cheap, rest
        self.costs[light] -= gain
        self.costs[other] += gain
        return gain

    def _cost_of_a_token(self, number: int) -> tuple[float, int]:
        """Return what samples are sorted by: of equal ones the first comes first."""
        return self.sizes.costs[number] / self.sizes.tokens[number], number

    def _fits(self, pack: list[int]) -> bool:
        """Return whether a pack keeps the budgets of patches and samples."""
        patches = sum(self.sizes.patches[number] for number in pack)
        most = self.budget.max_samples or len(pack)
        return patches <= self.budget.patches and len(pack) <= most


def first_filling(sizes: list[int], least: int, most: int) -> list[int]:
    """Return places of sizes that add up to between `least` and `most`, early ones if possible; empty if none are found.

    The first that fit are taken, but for the last few of them: among those and the ones after them `_subset` looks.
    """
    fitting = bisect_right(list(accumulate(sizes)), most)
    fixed = max(0, fitting - _FREE)
    taken = sum(sizes[:fixed])
    free = _subset(sizes[fixed:], max(0, least - taken), most - taken)
    return [] if free is None else [*range(fixed), *(fixed + place for place in free)]


def _subset(sizes: list[int], least: int, most: int) -> list[int] | None:
    """Return places of sizes that add up to between the two, of as few of the first sizes as can; None if no sums do.

    The sums of the first sizes are the bits of one whole number.
    """
    below = (1 << (most + 1)) - 1
    sums = [1]
    for size in sizes:
        # a longer one than the room would make numbers of its length
        more = sums[-1] << size if size <= most else 0
        sums.append((sums[-1] | more) & below)
        if sums[-1] >> least:
            break
    left = sums[-1].bit_length() - 1
    if left < least:
        return None
    places = []
    for place in reversed(range(len(sums) - 1)):
        # the later ones are left out where they can be
        if not sums[place] >> left & 1:
            left -= sizes[place]
            places.append(place)
    return places
