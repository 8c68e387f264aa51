"""Which samples share a pack: windowed best-fit with carry-over under two budgets. Pure Python on plain lists."""

from bisect import bisect_left, bisect_right, insort
from typing import Final

_LOOKS: Final = 256
"""Candidates tried for one place when the patch budget binds."""
_SHIFT: Final = 32


def pack_samples(
    tokens: list[int],
    patches: list[int],
    token_budget: int,
    patch_budget: int,
    window: int,
    multiple: int = 1,
    most: int = 0,
) -> list[list[int]]:
    """Put samples into packs; every pack fits both budgets, every sample is in exactly one.

    `window` samples wait at a time. The oldest opens a pack, so none waits for more than `window` packs. The oldest are
    added while there is room for any two, then the largest that fits until none does, and one is traded for a waiting one
    that leaves less room. What did not fit stays, and the window is filled up in order. Each sample alone must fit.

    Args:
        tokens: of each sample.
        patches: of each sample.
        token_budget: tokens of a pack.
        patch_budget: patches of a pack.
        window: samples that wait.
        multiple: each sample takes up its tokens rounded up to this multiple.
        most: samples of a pack; 0: any number.

    Returns:
        the samples' numbers, pack by pack.
    """
    if multiple > 1:
        tokens = [-(-size // multiple) * multiple for size in tokens]
    pool = _Pool(tokens, patches, window)
    packs = []
    while pool.refill():
        packs.append(pool.take_pack(token_budget, patch_budget, most or len(tokens)))
    return packs


class _Pool:
    """The waiting samples, sorted by (tokens, oldest last)."""

    def __init__(self, tokens: list[int], patches: list[int], window: int) -> None:
        self.tokens, self.patches, self.window = tokens, patches, window
        self.waiting: list[int] = []
        self.taken = bytearray(len(tokens))
        self.entered = self.oldest = 0

    def refill(self) -> bool:
        """Fill up the window; False when nothing is left."""
        room = min(self.window - len(self.waiting), len(self.tokens) - self.entered)
        for number in range(self.entered, self.entered + room):
            insort(self.waiting, self._key(number))
        self.entered += room
        return bool(self.waiting)

    def take_pack(self, tokens: int, patches: int, most: int) -> list[int]:
        pack = [self._pop(self._place_of_oldest())]
        tokens -= self.tokens[pack[0]]
        patches -= self.patches[pack[0]]
        while len(pack) < most and (place := self._next(tokens, patches)) >= 0:
            number = self._pop(place)
            tokens -= self.tokens[number]
            patches -= self.patches[number]
            pack.append(number)
        self._exchange(pack, tokens, patches)
        return pack

    def _exchange(self, pack: list[int], tokens: int, patches: int) -> None:
        """Trade one sample (not the opener) for the waiting one that fills the rest best."""
        gain, change = 0, (-1, -1)
        for place, number in enumerate(pack[1:], start=1):
            candidate = self._largest(self.tokens[number] + tokens, self.patches[number] + patches)
            if candidate >= 0 and (more := (self.waiting[candidate] >> _SHIFT) - self.tokens[number]) > gain:
                gain, change = more, (place, candidate)
            if gain == tokens:
                break
        if gain:
            place, candidate = change
            returned, pack[place] = pack[place], self._pop(candidate)
            self.taken[returned] = 0
            self.oldest = min(self.oldest, returned)
            insort(self.waiting, self._key(returned))

    def _next(self, tokens: int, patches: int) -> int:
        """While there is room for any two the oldest, so that small ones do not pile up; then the largest that fits."""
        if self.waiting and 2 * (self.waiting[-1] >> _SHIFT) <= tokens:
            place = self._place_of_oldest()
            if self.patches[self.oldest] <= patches:
                return place
        return self._largest(tokens, patches)

    def _place_of_oldest(self) -> int:
        while self.taken[self.oldest]:
            self.oldest += 1
        return bisect_left(self.waiting, self._key(self.oldest))

    def _largest(self, tokens: int, patches: int) -> int:
        place = bisect_right(self.waiting, (tokens + 1) << _SHIFT) - 1
        for candidate in range(place, max(-1, place - _LOOKS), -1):
            if self.patches[self._number(self.waiting[candidate])] <= patches:
                return candidate
        return -1

    def _pop(self, place: int) -> int:
        number = self._number(self.waiting.pop(place))
        self.taken[number] = 1
        return number

    def _key(self, number: int) -> int:
        return (self.tokens[number] << _SHIFT) | (len(self.tokens) - number)

    def _number(self, key: int) -> int:
        return len(self.tokens) - (key & ((1 << _SHIFT) - 1))
