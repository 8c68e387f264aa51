"""Which sample is drawn when: a closed form of (seed, weights, sizes, position), without state or randomness of a library.

Position g of the stream belongs to a dataset by quota, exact over every PERIOD positions. The k-th draw of a dataset of n
samples is sample `permutation(k mod n)` of epoch `k div n`: each sample once an epoch, in an order of its own each time.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

PERIOD: Final = 65_536
"""Positions over which every dataset gets exactly its share; a weight above 0 gets at least one of them."""
_ROUNDS: Final = 6
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Draws:
    """Consecutive draws: which dataset, and which of its samples."""

    datasets: NDArray[np.int32]
    samples: NDArray[np.int64]


class Mixture:
    """Draws from datasets of `sizes` samples, named `names`, in proportion to `weights` (samples, not tokens)."""

    def __init__(self, names: list[str], sizes: list[int], weights: list[float], seed: int) -> None:
        self.sizes, self.seed = sizes, seed
        self.quotas = quotas(weights, PERIOD)
        self._keys = [key_of(seed, name) for name in names]
        self._period = lru_cache(maxsize=2)(self._make_period)

    def draws(self, start: int, count: int) -> Draws:
        """The draws at positions start .. start + count, which must not cross a multiple of PERIOD."""
        period, offset = divmod(start, PERIOD)
        datasets, ordinals = self._period(period)
        datasets, ordinals = datasets[offset : offset + count], ordinals[offset : offset + count]
        samples = np.empty(len(datasets), np.int64)
        for index, (size, key) in enumerate(zip(self.sizes, self._keys, strict=True)):
            mine = datasets == index
            samples[mine] = samples_of(ordinals[mine], size, key)
        return Draws(datasets, samples)

    def counts(self, position: int) -> NDArray[np.int64]:
        """Draws of each dataset before a position."""
        period, offset = divmod(position, PERIOD)
        begun = np.bincount(self._period(period)[0][:offset], minlength=len(self.sizes)) if offset else 0
        return np.asarray(self.quotas * period + begun, np.int64)

    def _make_period(self, period: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Dataset of each position, and which draw of that dataset it is; a dataset's draws are evenly spread."""
        datasets = np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.quotas)
        within = np.concatenate([np.arange(quota) for quota in self.quotas])
        jitter = mix(np.arange(PERIOD, dtype=np.uint64), key_of(self.seed, f"period {period}")) >> np.uint64(12)
        place = (within + jitter / 2.0**52) / self.quotas[datasets]
        order = np.argsort(place, kind="stable")
        return datasets[order], (within + period * self.quotas[datasets])[order]


def quotas(weights: list[float], total: int) -> NDArray[np.int64]:
    """Whole numbers in proportion to the weights that add up to `total`: largest remainder, ties to the first.

    A weight above 0 gets at least 1, taken from the largest.
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights) * total
    found = np.floor(shares).astype(np.int64)
    order = np.argsort(-(shares - found), kind="stable")
    found[order[: total - int(found.sum())]] += 1
    for index in np.flatnonzero((found == 0) & (shares > 0)):
        found[index] += 1
        found[int(np.argmax(found))] -= 1
    return found


def samples_of(ordinals: NDArray[np.int64], size: int, key: np.uint64) -> NDArray[np.int64]:
    """Sample indices of the k-th draws of a dataset of `size` samples."""
    epochs, places = np.divmod(ordinals, size)
    keys = mix(epochs.astype(np.uint64), key)
    return permutation(places, size, keys)


def permutation(places: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each place lies in the permutation of 0..size-1 named by its key.

    A Feistel network over the next power of two, walked until it falls inside: no table, so any size costs the same.
    """
    bits = max(2, (size - 1).bit_length())
    values = _feistel(places.astype(np.uint64), bits, keys)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], bits, keys[outside])
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    low_bits = bits // 2
    for turn in range(_ROUNDS):
        low_mask, high_bits = np.uint64((1 << low_bits) - 1), bits - low_bits
        low, high = values & low_mask, values >> np.uint64(low_bits)
        scrambled = mix(low, keys + np.uint64(turn)) & np.uint64((1 << high_bits) - 1)
        values = (low << np.uint64(high_bits)) | (high ^ scrambled)
        low_bits = high_bits
    return values


def mix(values: NDArray[np.uint64], key: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """64 well mixed bits of each value under a key (the finaliser of SplitMix64, applied twice)."""
    with np.errstate(over="ignore"):
        return _scramble(_scramble(values * _GOLDEN + key) ^ key)


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key_of(seed: int, name: str) -> np.uint64:
    """A 64-bit key from a seed and a name, the same on every machine."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))
