"""Packing: both budgets hold, nothing is lost, little is padding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloom.data.packing import pack_samples

SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 60)), max_size=200)


@settings(max_examples=300, deadline=None)
@given(SAMPLES, st.integers(1, 40))
def test_budgets_hold_and_every_sample_is_packed_once(samples: list[tuple[int, int]], window: int) -> None:
    tokens, patches = [size for size, _ in samples], [count for _, count in samples]
    packs = pack_samples(tokens, patches, token_budget=100, patch_budget=60, window=window)
    assert sorted(number for pack in packs for number in pack) == list(range(len(samples)))
    assert all(sum(tokens[number] for number in pack) <= 100 for pack in packs)
    assert all(sum(patches[number] for number in pack) <= 60 for pack in packs)


def lognormal(mean: float, deviation: float, most: int, seed: int = 0) -> list[int]:
    sizes = np.exp(np.random.default_rng(seed).normal(mean, deviation, 20_000)).astype(int) + 10
    return np.minimum(sizes, most).tolist()


def test_little_is_padding() -> None:
    for mean, deviation, budget in ((3.5, 0.4, 512), (6.6, 1.1, 8192), (6.6, 1.2, 32_768)):
        tokens = lognormal(mean, deviation, budget)
        packs = pack_samples(tokens, [0] * len(tokens), budget, 1, window=1024)
        assert sum(tokens) / budget / len(packs) > 0.998


def test_a_binding_patch_budget_is_filled() -> None:
    tokens = lognormal(6.0, 0.6, 8192)
    tight = 12_000
    patches = [min(tight, 4 * size // 10 * 9) if number % 2 else 0 for number, size in enumerate(tokens)]
    assert sum(patches) / tight > 1.15 * sum(tokens) / 8192
    packs = pack_samples(tokens, patches, 8192, tight, window=1024)
    assert max(sum(patches[number] for number in pack) for pack in packs) <= tight
    assert sum(patches) / tight / len(packs) > 0.97, "patches are what limits these packs"


def test_no_sample_waits_for_ever() -> None:
    tokens = [60, 60, 50, 10, *([60, 40] * 2000)]
    packs = pack_samples(tokens, [0] * len(tokens), 100, 1, window=16)
    for number in range(0, 1000, 7):
        place = next(place for place, pack in enumerate(packs) if number in pack)
        assert place <= number + 16
