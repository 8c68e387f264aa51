"""Which sample is drawn when: a closed form of (seed, weights, sizes, position), without state or randomness of a library.

Position g of the stream belongs to an entry of the mixture by quota, exact over every PERIOD positions. The k-th draw of a
dataset of n samples is sample `shuffled(k mod n)` of epoch `k div n`: each sample once an epoch, in an order of its own each
time. Entries with the same content draw from one order and so never repeat each other.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

PERIOD: Final = 65_536
"""Positions over which every entry gets exactly its share; a weight above 0 gets at least one of them."""
WINDOW_BLOCKS: Final = 64
"""Blocks whose samples are mixed with one another."""
_ROUNDS: Final = 6
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Draws:
    """Consecutive draws: which entry of the mixture, and which sample of its dataset."""

    datasets: NDArray[np.int32]
    samples: NDArray[np.int64]


class Mixture:
    """Draws from datasets, in proportion to weights in samples.

    Args:
        contents: what tells the dataset of each entry apart; entries with the same one share an order.
        sizes: samples of each entry's dataset.
        weights: of each entry, above 0.
        seed: of the orders.
        block: samples that stay together on their way through the shuffle, 1: none.
        before: draws of each content that were made before position 0.
    """

    def __init__(
        self,
        contents: Sequence[str],
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        block: int = 1,
        before: Mapping[str, int] | None = None,
    ) -> None:
        self.sizes, self.seed, self.block = list(sizes), seed, block
        self.contents = list(dict.fromkeys(contents))
        self.quotas = quotas(weights, PERIOD)
        self.groups = np.array([self.contents.index(content) for content in contents])
        """Of each entry the number of its content."""
        self._group_quotas = np.bincount(self.groups, self.quotas).astype(np.int64)
        made_before = before or {}
        counts = [made_before.get(content, 0) for content in self.contents]
        self._before = np.array(counts, np.int64)
        self._keys = [key_of(seed, content) for content in self.contents]
        # two: draws run from one period into the next
        self._period = lru_cache(maxsize=2)(self._make_period)

    def draws(self, start: int, count: int) -> Draws:
        """Return the draws at positions start .. start + count, which must not cross a multiple of PERIOD."""
        period, offset = divmod(start, PERIOD)
        here = slice(offset, offset + count)
        all_datasets, all_ordinals = self._period(period)
        datasets, ordinals = all_datasets[here], all_ordinals[here]
        groups = self.groups[datasets]
        samples = np.empty(len(datasets), np.int64)
        for group, key in enumerate(self._keys):
            mine = groups == group
            size = self.sizes[int(np.argmax(self.groups == group))]
            samples[mine] = samples_of(ordinals[mine], size, key, self.block)
        return Draws(datasets, samples)

    def counts(self, position: int) -> NDArray[np.int64]:
        """Count the draws of each entry before a position, from position 0 on: int64 [entries]."""
        period, offset = divmod(position, PERIOD)
        counts = np.asarray(self.quotas * period, np.int64)
        # a whole number of periods needs none to be made
        if offset:
            datasets, _ = self._period(period)
            counts = counts + np.bincount(datasets[:offset], minlength=len(self.sizes))
        return counts

    def counters(self, position: int) -> dict[str, int]:
        """Count the draws of each content before a position, those before position 0 included."""
        own = np.bincount(self.groups, self.counts(position)).astype(np.int64)
        return dict(zip(self.contents, (self._before + own).tolist(), strict=True))

    def _make_period(
        self,
        period: int,
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the entry of each position (int32 [PERIOD]), and which draw of its content it is (int64 [PERIOD])."""
        datasets = self._spread_entries(period)
        ordinals = np.empty(PERIOD, np.int64)
        groups = self.groups[datasets]
        for group, quota in enumerate(self._group_quotas):
            first = period * quota + self._before[group]
            ordinals[groups == group] = np.arange(quota) + first
        return datasets, ordinals

    def _spread_entries(self, period: int) -> NDArray[np.int32]:
        """Return the entry of each position of a period, int32 [PERIOD]."""
        entries = np.arange(len(self.sizes), dtype=np.int32)
        datasets = np.repeat(entries, self.quotas)
        # the draws of an entry are evenly spread, each at random within its stretch
        within = np.concatenate([np.arange(quota) for quota in self.quotas])
        positions = np.arange(PERIOD, dtype=np.uint64)
        # 52 bits: all that a float64 between 0 and 1 can hold
        jitter = mix(positions, key_of(self.seed, f"period {period}")) >> np.uint64(12)
        place = (within + jitter / 2.0**52) / self.quotas[datasets]
        return datasets[np.argsort(place, kind="stable")]


def quotas(weights: Sequence[float], total: int) -> NDArray[np.int64]:
    """Return whole numbers in proportion to the weights that add up to `total`, int64 [weights].

    Largest remainder, ties to the first. A weight above 0 gets at least 1, taken from the largest.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights) * total
    numbers = np.floor(shares).astype(np.int64)
    order = np.argsort(-(shares - numbers), kind="stable")
    # what rounding down left over
    left = total - int(numbers.sum())
    numbers[order[:left]] += 1
    for index in np.flatnonzero((numbers == 0) & (shares > 0)):
        numbers[index] += 1
        # the largest misses it least
        numbers[int(np.argmax(numbers))] -= 1
    return numbers


def samples_of(
    ordinals: NDArray[np.int64], size: int, key: np.uint64, block: int = 1
) -> NDArray[np.int64]:
    """Return the sample indices (int64 [n]) of the k-th draws (int64 [n], from 0) of a dataset of `size` samples."""
    # each epoch has an order of its own
    epochs, places = np.divmod(ordinals, size)
    keys = mix(epochs.astype(np.uint64), key)
    if block <= 1:
        return permutation(places, size, keys)
    return blockwise(places, size, keys, block)


def blockwise(
    places: NDArray[np.int64],
    size: int,
    keys: NDArray[np.uint64],
    block: int,
) -> NDArray[np.int64]:
    """Permute 0..size-1 so that `block` neighbours stay near each other: where each place (int64 [n]) lies, int64 [n].

    `keys`, uint64 [n], name the permutation of each place. Blocks of neighbours are permuted, then the samples of
    WINDOW_BLOCKS consecutive blocks, so a reader meets each block within one window of places.
    """
    window = block * WINDOW_BLOCKS
    numbers, offsets = np.divmod(places, window)
    window_keys = mix(numbers.astype(np.uint64), keys)
    mixed = np.empty(len(places), np.int64)
    # the last window is shorter than the others
    for length in {min(window, size), size % window} - {0}:
        mine = np.minimum(window, size - numbers * window) == length
        mixed[mine] = permutation(offsets[mine], length, window_keys[mine])

    places = numbers * window + mixed
    blocks = size // block
    whole = places < blocks * block
    if blocks > 1:
        moved, within = np.divmod(places[whole], block)
        places[whole] = permutation(moved, blocks, keys[whole]) * block + within
    # Where the first block begins differs from key to key, and with it what is left at the end.
    shift = (mix(keys, np.uint64(1)) % np.uint64(size)).astype(np.int64)
    return (places + shift) % size


def permutation(
    places: NDArray[np.int64], size: int, keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Return where each place (int64 [n]) lies in the permutation of 0..size-1 named by its key (uint64 [n]), int64 [n].

    A Feistel network over the next power of two, walked until it falls inside: no table, so any size costs the same.
    """
    # two bits at least: each half needs one
    bits = max(2, (size - 1).bit_length())
    values = _feistel(places.astype(np.uint64), bits, keys)
    # at most half of the power of two is outside, so two rounds are usual
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], bits, keys[outside])
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(
    values: NDArray[np.uint64],
    bits: int,
    keys: NDArray[np.uint64],
) -> NDArray[np.uint64]:
    """Permute the numbers of `bits` bits: in each round one half is mixed into the other."""
    low_bits = bits // 2
    for turn in range(_ROUNDS):
        high_bits = bits - low_bits
        low_mask, high_mask = np.uint64((1 << low_bits) - 1), np.uint64((1 << high_bits) - 1)
        low, high = values & low_mask, values >> np.uint64(low_bits)
        scrambled = mix(low, keys + np.uint64(turn)) & high_mask
        # the halves change places, and their sizes with them
        values = (low << np.uint64(high_bits)) | (high ^ scrambled)
        low_bits = high_bits
    return values


def mix(
    values: NDArray[np.uint64],
    key: np.uint64 | NDArray[np.uint64],
) -> NDArray[np.uint64]:
    """Return 64 well mixed bits of each value (uint64 [n]) under a key, uint64 or uint64 [n].

    Source: the finaliser of SplitMix64, applied twice.
    """
    # arithmetic modulo 2^64 is meant
    with np.errstate(over="ignore"):
        return _scramble(_scramble(values * _GOLDEN + key) ^ key)


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(seed: int, name: str) -> np.uint64:
    """Make a 64-bit key from a seed and a name, the same on every machine."""
    # Python's own hash differs from process to process
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))
