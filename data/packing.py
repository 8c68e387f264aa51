"""Which samples share a pack: windowed best-fit with carry-over under two budgets. Pure Python on plain lists."""

from bisect import bisect_left, bisect_right, insort
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
    added while there is room for any two, then the largest that fits, of those about as large the one with most patches,
    until none does or one traded for a waiting one fills the pack. What did not fit stays, and the window is filled up in order. Each sample alone must fit.

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
        budget, pack = tokens, [self._pop(self._place_of_oldest())]
        tokens -= self.tokens[pack[0]]
        patches -= self.patches[pack[0]]
        while len(pack) < most and self.waiting:
            if tokens * _NEARLY_FULL <= budget and self._exchange(pack, tokens, patches, budget // _FULL):
                return pack
            if (place := self._next(tokens, patches)) < 0:
                break
            number = self._pop(place)
            tokens -= self.tokens[number]
            patches -= self.patches[number]
            pack.append(number)
        self._exchange(pack, tokens, patches, tokens)
        return pack

    def _exchange(self, pack: list[int], tokens: int, patches: int, left: int) -> bool:
        """Trade one sample (not the opener) for the waiting one that fills the rest best, if no more than `left` is left."""
        gain, change = max(0, tokens - left - 1), (-1, -1)
        for place, number in enumerate(pack[1:], start=1):
            candidate = self._largest(self.tokens[number] + tokens, self.patches[number] + patches)
            if candidate >= 0 and (more := (self.waiting[candidate] >> _SHIFT) - self.tokens[number]) > gain:
                gain, change = more, (place, candidate)
            if gain == tokens:
                break
        place, candidate = change
        if place < 0:
            return False
        returned, pack[place] = pack[place], self._pop(candidate)
        self.taken[returned] = 0
        self.oldest = min(self.oldest, returned)
        insort(self.waiting, self._key(returned))
        return True

    def _next(self, tokens: int, patches: int) -> int:
        """While there is room for any two the oldest, so that small ones do not pile up; then the largest that fits."""
        if 2 * (self.waiting[-1] >> _SHIFT) <= tokens:
            place = self._place_of_oldest()
            if self.patches[self.oldest] <= patches:
                return place
        return self._with_most_patches(self._largest(tokens, patches), patches)

    def _with_most_patches(self, place: int, patches: int) -> int:
        """Of the samples about as long as the one at a place the one with most patches that fits.

        Samples without pictures are what packs with many pictures need to get full.
        """
        if place < 0:
            return place
        least = (self.waiting[place] >> _SHIFT) * 31 // 32
        best, most = place, self.patches[self._number(self.waiting[place])]
        for candidate in range(place - 1, max(-1, place - _ALIKE), -1):
            if self.waiting[candidate] >> _SHIFT < least:
                break
            if most < (found := self.patches[self._number(self.waiting[candidate])]) <= patches:
                best, most = candidate, found
        return best

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
