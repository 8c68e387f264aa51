"""Which samples share a pack: in order, with a best-fit end, under two budgets. Pure Python on plain lists."""

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

_LOOKS: Final = 256
"""Candidates tried for one place when the patch budget binds."""
_ALIKE: Final = 16
"""Samples of about the same length among which the one with most patches is taken."""
_NEARLY_FULL: Final = 64
_FULL: Final = 2048
"""When a 64th of a pack is free, one exchange that leaves no more than a 2048th ends it: small samples are spared for packs
that only they can fill. Worth 0.1 % of fill where patches bind."""
_SHIFT: Final = 32


@dataclass(frozen=True, slots=True)
class PackBudget:
    """What a pack holds, and how many samples wait for one."""

    tokens: int
    patches: int
    window: int
    """Samples that wait."""
    sample_multiple: int = 1
    """Each sample takes up its tokens rounded up to this multiple."""
    max_samples: int = 0
    """Samples of a pack; 0: any number."""

    def taken_up(self, tokens: list[int]) -> list[int]:
        """Return the room that samples of these lengths take up in a pack: padding does too."""
        multiple = self.sample_multiple
        if multiple == 1:
            return tokens
        return [-(-size // multiple) * multiple for size in tokens]


def pack_samples(
    tokens: list[int],
    patches: list[int],
    budget: PackBudget,
    orders: Sequence[int] = (),
    most_passed_over: Sequence[int] = (),
) -> list[list[int]]:
    """Put samples into packs; every pack fits both budgets, every sample is in exactly one.

    A pack takes the oldest waiting samples in order until one does not fit, then the largest that fits, of those about as
    large the one with most patches, until none does or one traded for a waiting one fills the pack. A window of samples
    waits at a time. So what the first packs hold is a prefix of the samples but for at most a window, and its sizes and
    kinds are those of the samples: packs need no shuffling. Each sample alone must fit.

    Args:
        tokens: of each sample.
        patches: of each sample.
        budget: of the packs.
        orders: of each sample the number of the order that it belongs to, if orders have limits of their own.
        most_passed_over: of each order, how many of its samples may be passed over: however many packs one takes from the
            front, they lack at most that many samples before the last one that they hold. With 0 the order is followed
            exactly.

    Returns:
        the samples' numbers, pack by pack.
    """
    tokens = budget.taken_up(tokens)
    pool = _Pool(tokens, patches, budget.window, orders, most_passed_over)
    packs = []
    max_samples = budget.max_samples or len(tokens)
    while pool.begin_pack():
        packs.append(pool.take_pack(budget.tokens, budget.patches, max_samples))
    return packs


@dataclass(slots=True)
class _Order:
    """The samples of one order in the window: the first ones may be taken, the others are held back.

    Ranks count its samples from 0. One of rank r may be taken while r <= base + limit; as base is at most the number taken
    before the pack, or all before it are taken, no more than `limit` lower ranks are then left.
    """

    limit: int
    held: deque[int] = field(default_factory=deque)
    offered: int = 0
    """Samples that could be taken so far."""
    taken: int = 0
    base: int = 0
    """What was taken of it when it last moved on."""
    moved: bool = False
    """Whether it moved on inside this pack: then what the pack has of it must not go back."""

    def move(self, inside: bool) -> None:
        """Count from what is taken now."""
        self.base, self.moved = self.taken, inside

    def offer(self) -> list[int]:
        """Release and return those held back that may be taken now."""
        if self.held and self.taken == self.offered:
            self.move(inside=True)
        count = min(len(self.held), self.base + self.limit + 1 - self.offered)
        self.offered += max(0, count)
        return [self.held.popleft() for _ in range(count)]


class _Pool:
    """The waiting samples. Those that may be taken are sorted by (tokens, oldest last)."""

    def __init__(
        self,
        tokens: list[int],
        patches: list[int],
        window: int,
        orders: Sequence[int],
        limits: Sequence[int],
    ) -> None:
        self.tokens, self.patches, self.window = tokens, patches, window
        # one whole number each, so that sorting compares no tuples
        count = len(tokens)
        self.keys = [(size << _SHIFT) | (count - number) for number, size in enumerate(tokens)]
        # a limit that the window keeps anyway needs no counting
        self.limited = {
            number: _Order(limit) for number, limit in enumerate(limits) if limit < window
        }
        self.orders: list[_Order | None] = [None] * len(tokens)
        if self.limited:
            self.orders = [self.limited.get(order) for order in orders]
        self.waiting: list[int] = []
        self.taken = bytearray(len(tokens))
        self.entered = self.gone = self.oldest = 0

    def begin_pack(self) -> bool:
        """Let the orders move on and fill up the window; return False when nothing is left."""
        for order in self.limited.values():
            order.move(inside=False)
            self._offer(order)
        self._enter()
        return bool(self.waiting)

    def take_pack(self, tokens: int, patches: int, most: int) -> list[int]:
        """Take the samples of a pack with these budgets, `most` at most."""
        budget, pack, in_order = tokens, list[int](), True
        nearly_full = budget // _NEARLY_FULL
        while len(pack) < most and self.waiting:
            if tokens <= nearly_full and self._exchange(pack, tokens, patches, budget // _FULL):
                return pack
            # the last place of a pack with a limit is for what fits best
            has_room = len(pack) < max(1, most - 1)
            in_order = in_order and has_room and self._follows(bool(pack), tokens, patches)
            # once the oldest did not fit, the rest of the pack is for what fits best
            number = self._oldest() if in_order else self._best(tokens, patches)
            if number < 0:
                break
            self._take(number)
            tokens -= self.tokens[number]
            patches -= self.patches[number]
            pack.append(number)
        self._exchange(pack, tokens, patches, tokens)
        return pack

    def _follows(self, begun: bool, tokens: int, patches: int) -> bool:
        """Return whether the oldest goes into a pack with this room: if it is begun, only with room for one of middle size more.

        The rest is for what fits best: where many samples are as long as half a pack, they must be paired.
        """
        oldest, middle = self._oldest(), self.waiting[len(self.waiting) // 2] >> _SHIFT
        return self.tokens[oldest] + begun * middle <= tokens and self.patches[oldest] <= patches

    def _exchange(
        self,
        pack: list[int],
        tokens: int,
        patches: int,
        left: int,
    ) -> bool:
        """Trade one sample (not the opener) for the waiting one that fills the rest best.

        Return False if none leaves at most `left` of the free `tokens`.
        """
        gain, change = max(0, tokens - left - 1), (-1, -1)
        if not self.waiting or gain >= self.waiting[-1] >> _SHIFT:
            return False
        for place, number in enumerate(pack[1:], start=1):
            # what its order has moved past must not go back
            if (order := self.orders[number]) and order.moved:
                continue
            candidate = self._largest(self.tokens[number] + tokens, self.patches[number] + patches)
            if candidate >= 0:
                key = self.waiting[candidate]
                more = (key >> _SHIFT) - self.tokens[number]
                if more > gain:
                    gain, change = more, (place, self._number(key))
            # nothing fills a pack better than to the last token
            if gain == tokens:
                break
        place, candidate = change
        if place < 0:
            return False
        self._return(pack[place])
        self._take(candidate)
        pack[place] = candidate
        return True

    def _best(self, tokens: int, patches: int) -> int:
        """Return the largest sample that fits; of those about as long the one with most patches that fits; -1: none.

        Samples without pictures are what packs with many pictures need to get full.
        """
        place = self._largest(tokens, patches)
        if place < 0:
            return -1
        # about as long: within a 32nd
        least = (self.waiting[place] >> _SHIFT) * 31 // 32
        best = self._number(self.waiting[place])
        for candidate in range(place - 1, max(-1, place - _ALIKE), -1):
            if self.waiting[candidate] >> _SHIFT < least:
                break
            number = self._number(self.waiting[candidate])
            if self.patches[best] < self.patches[number] <= patches:
                best = number
        return best

    def _oldest(self) -> int:
        """Return the first sample that was not taken: of its order it is the first too, so it may be taken."""
        while self.taken[self.oldest]:
            self.oldest += 1
        return self.oldest

    def _largest(self, tokens: int, patches: int) -> int:
        """Return the place of the largest sample that fits; -1: none of the _LOOKS tried."""
        # a key holds the length in its upper bits, so this is the last one not longer
        place = bisect_right(self.waiting, (tokens + 1) << _SHIFT) - 1
        for candidate in range(place, max(-1, place - _LOOKS), -1):
            if self.patches[self._number(self.waiting[candidate])] <= patches:
                return candidate
        return -1

    def _enter(self) -> None:
        """Fill up the window."""
        while self.entered < len(self.tokens) and self.entered - self.gone < self.window:
            if order := self.orders[self.entered]:
                order.held.append(self.entered)
                self._offer(order)
            else:
                # orders without a limit of their own keep no one back
                insort(self.waiting, self.keys[self.entered])
            self.entered += 1

    def _offer(self, order: _Order) -> None:
        for number in order.offer():
            insort(self.waiting, self.keys[number])

    def _take(self, number: int) -> None:
        del self.waiting[bisect_left(self.waiting, self.keys[number])]
        self.taken[number] = 1
        self.gone += 1
        if order := self.orders[number]:
            order.taken += 1
            self._offer(order)
        self._enter()

    def _return(self, number: int) -> None:
        insort(self.waiting, self.keys[number])
        self.taken[number] = 0
        self.gone -= 1
        self.oldest = min(self.oldest, number)
        if order := self.orders[number]:
            order.taken -= 1

    def _number(self, key: int) -> int:
        return len(self.tokens) - (key & ((1 << _SHIFT) - 1))
