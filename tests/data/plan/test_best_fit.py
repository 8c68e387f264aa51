"""Packing: both budgets hold, nothing is lost, little is padding."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloom.benchmarks.data.mixtures import MIXTURES, fitting
from visionloom.data.plan.best_fit import PackBudget, pack_samples

SAMPLES = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 60)), max_size=200)


@settings(max_examples=300, deadline=None)
@given(SAMPLES, st.integers(1, 40))
def test_budgets_hold_and_every_sample_is_packed_once(
    samples: list[tuple[int, int]], window: int
) -> None:
    tokens, patches = [size for size, _ in samples], [count for _, count in samples]
    packs = pack_samples(tokens, patches, PackBudget(100, 60, window))
    assert sorted(number for pack in packs for number in pack) == list(range(len(samples)))
    assert all(sum(tokens[number] for number in pack) <= 100 for pack in packs)
    assert all(sum(patches[number] for number in pack) <= 60 for pack in packs)


def gaps(packs: list[list[int]], mine: list[int]) -> int:
    """The most samples of an order that any number of first packs lacks before the last one that they hold: counted one by one."""
    places, held, most = {number: place for place, number in enumerate(mine)}, set[int](), 0
    for pack in packs:
        held.update(places[number] for number in pack if number in places)
        most = max(most, sum(place not in held for place in range(max(held, default=-1) + 1)))
    return most


@settings(max_examples=300, deadline=None)
@given(
    SAMPLES,
    st.integers(1, 40),
    st.lists(st.sampled_from([0, 1, 2, 5, 30]), min_size=1, max_size=4),
    st.sampled_from([0, 3]),
)
def test_orders_are_kept_up_to_their_limits(
    samples: list[tuple[int, int]], window: int, limits: list[int], most: int
) -> None:
    tokens, patches = [size for size, _ in samples], [count for _, count in samples]
    orders = [(7 * number + size) % len(limits) for number, size in enumerate(tokens)]
    packs = pack_samples(
        tokens, patches, PackBudget(100, 60, window, max_samples=most), orders, limits
    )
    assert sorted(number for pack in packs for number in pack) == list(range(len(samples)))
    assert all(sum(tokens[number] for number in pack) <= 100 for pack in packs)
    assert all(sum(patches[number] for number in pack) <= 60 for pack in packs)
    assert gaps(packs, list(range(len(samples)))) <= window
    for order, limit in enumerate(limits):
        assert gaps(packs, [number for number, mine in enumerate(orders) if mine == order]) <= limit


def test_packs_are_alike_from_the_first_to_the_last() -> None:
    tokens, patches = fitting(MIXTURES["8k"], 8000)
    packs = pack_samples(tokens.tolist(), patches.tolist(), PackBudget(8192, 26_214, window=1024))
    tenths = np.array(
        [
            np.mean([len(pack) for pack in excerpt])
            for excerpt in np.array_split(np.array(packs, object), 10)
        ]
    )
    np.testing.assert_allclose(tenths, len(tokens) / len(packs), rtol=0.15)


def test_samples_of_half_a_pack_are_paired() -> None:
    tokens = np.random.default_rng(0).integers(1000, 32_768, 4000).tolist()
    packs = pack_samples(tokens, [0] * len(tokens), PackBudget(32_768, 1, window=1024))
    assert sum(tokens) / 32_768 / len(packs) > 0.97


def lognormal(mean: float, deviation: float, most: int, seed: int = 0) -> list[int]:
    sizes = np.exp(np.random.default_rng(seed).normal(mean, deviation, 20_000)).astype(int) + 10
    return np.minimum(sizes, most).tolist()


def test_little_is_padding() -> None:
    for mean, deviation, budget in ((3.5, 0.4, 512), (6.6, 1.1, 8192), (6.6, 1.2, 32_768)):
        tokens = lognormal(mean, deviation, budget)
        packs = pack_samples(tokens, [0] * len(tokens), PackBudget(budget, 1, window=1024))
        assert sum(tokens) / budget / len(packs) > 0.998


def test_a_binding_patch_budget_is_filled() -> None:
    tokens = lognormal(6.0, 0.6, 8192)
    tight = 12_000
    patches = [
        min(tight, 4 * size // 10 * 9) if number % 2 else 0 for number, size in enumerate(tokens)
    ]
    assert sum(patches) / tight > 1.15 * sum(tokens) / 8192
    packs = pack_samples(tokens, patches, PackBudget(8192, tight, window=1024))
    assert max(sum(patches[number] for number in pack) for pack in packs) <= tight
    assert sum(patches) / tight / len(packs) > 0.97, "patches are what limits these packs"


def test_no_sample_waits_for_ever() -> None:
    tokens = [60, 60, 50, 10, *([60, 40] * 2000)]
    packs = pack_samples(tokens, [0] * len(tokens), PackBudget(100, 1, window=16))
    for number in range(0, 1000, 7):
        place = next(place for place, pack in enumerate(packs) if number in pack)
        assert place <= number + 16


def fewest_packs(
    tokens: list[int], patches: list[int], token_budget: int, patch_budget: int
) -> int:
    """The optimum by dynamic programming over all subsets."""
    everything = (1 << len(tokens)) - 1

    @cache
    def best(packed: int) -> tuple[int, int, int]:
        """Packs, then tokens and patches of the last one, for the lexicographically best way to pack a subset."""
        if not packed:
            return 1, 0, 0
        found = (len(tokens) + 1, 0, 0)
        for number in range(len(tokens)):
            if packed >> number & 1:
                packs, used, shown = best(packed & ~(1 << number))
                if (
                    used + tokens[number] <= token_budget
                    and shown + patches[number] <= patch_budget
                ):
                    found = min(found, (packs, used + tokens[number], shown + patches[number]))
                else:
                    found = min(found, (packs + 1, tokens[number], patches[number]))
        return found

    return best(everything)[0]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(5, 70), st.integers(0, 20)), min_size=1, max_size=9))
def test_as_few_packs_as_the_optimum_or_one_more(samples: list[tuple[int, int]]) -> None:
    tokens, patches = [size for size, _ in samples], [count for _, count in samples]
    packs = pack_samples(tokens, patches, PackBudget(100, 60, window=64))
    best = fewest_packs(tokens, patches, 100, 60)
    assert len(packs) <= best + 1


@settings(max_examples=100, deadline=None)
@given(SAMPLES, st.integers(1, 9), st.integers(1, 5))
def test_padded_samples_and_their_number_are_bounded(
    samples: list[tuple[int, int]], multiple: int, most: int
) -> None:
    tokens, patches = [size for size, _ in samples], [count for _, count in samples]
    packs = pack_samples(tokens, patches, PackBudget(108, 60, 16, multiple, most))
    assert sorted(number for pack in packs for number in pack) == list(range(len(samples)))
    assert all(
        sum(-(-tokens[number] // multiple) * multiple for number in pack) <= 108 for pack in packs
    )
    assert all(len(pack) <= most for pack in packs)


@pytest.mark.parametrize(
    ("name", "patches_per_token", "least"),
    [("8k", 10**6, 0.997), ("8k", 3.2, 0.995), ("32k", 3.2, 0.998), ("256k", 3.2, 0.999)],
)
def test_fill_of_mixtures(name: str, patches_per_token: float, least: float) -> None:
    mixture = MIXTURES[name]
    tokens, patches = fitting(mixture, 10_000)
    budget = int(patches_per_token * mixture.sequence_length)
    packs = pack_samples(
        tokens.tolist(), patches.tolist(), PackBudget(mixture.sequence_length, budget, 1024)
    )
    full = packs[:-4]  # an endless stream has no last packs
    assert (
        sum(tokens[number] for pack in full for number in pack)
        / mixture.sequence_length
        / len(full)
        > least
    )
