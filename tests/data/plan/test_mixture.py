"""Draws: exact shares, every sample once an epoch, and a closed form that needs no past."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloom.data.plan.mixture import (
    PERIOD,
    WINDOW_BLOCKS,
    Mixture,
    blockwise,
    key_of,
    permutation,
    quotas,
    samples_of,
)

NAMES, SIZES, WEIGHTS = ["a", "b", "c"], [7, 1000, 1000], [1.0, 2.5, 2.5]


def take(mixture: Mixture, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    found = mixture.draws(start, count)
    return found.datasets, found.samples


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**62))
def test_permutation_is_one(size: int, key: int) -> None:
    found = permutation(np.arange(size), size, np.full(size, key, np.uint64))
    np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_permutation_mixes() -> None:
    size = 5000
    found = permutation(np.arange(size), size, np.full(size, key_of(1, "x"), np.uint64))
    assert abs(np.corrcoef(np.arange(size), found)[0, 1]) < 0.05
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.05


def test_every_sample_once_an_epoch_in_a_new_order() -> None:
    datasets, samples = take(Mixture(NAMES, SIZES, WEIGHTS, seed=3), 0, PERIOD)
    for number, size in enumerate(SIZES):
        mine = samples[datasets == number]
        epochs = [mine[start : start + size] for start in range(0, len(mine) - size + 1, size)]
        assert len(epochs) > 10
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert not any((one == other).all() for one, other in pairwise(epochs))
    assert (samples[datasets == 1][:1000] != samples[datasets == 2][:1000]).any(), (
        "datasets have orders of their own"
    )


def test_epochs_go_on_over_periods() -> None:
    mixture = Mixture(["a"], [50_000], [1.0], seed=3)
    samples = np.concatenate([take(mixture, period * PERIOD, PERIOD)[1] for period in range(2)])
    assert sorted(samples[:50_000]) == sorted(samples[50_000:100_000]) == list(range(50_000))


def test_draws_need_no_past() -> None:
    whole = take(Mixture(NAMES, SIZES, WEIGHTS, seed=5), PERIOD, 4096)
    excerpts = [
        take(Mixture(NAMES, SIZES, WEIGHTS, seed=5), PERIOD + start, 512)
        for start in range(0, 4096, 512)
    ]
    for index in range(2):
        np.testing.assert_array_equal(
            np.concatenate([excerpt[index] for excerpt in excerpts]), whole[index]
        )
    other = take(Mixture(NAMES, SIZES, WEIGHTS, seed=6), PERIOD, 4096)
    assert (other[1] != whole[1]).any()


@pytest.mark.parametrize("position", [0, 1, 1000, PERIOD, 3 * PERIOD + 77])
def test_counts_are_those_of_the_draws(position: int) -> None:
    mixture = Mixture(NAMES, SIZES, WEIGHTS, seed=3)
    periods = [take(mixture, period * PERIOD, PERIOD)[0] for period in range(4)]
    drawn = np.concatenate(periods)[:position]
    np.testing.assert_array_equal(mixture.counts(position), np.bincount(drawn, minlength=3))


def test_shares_hold_in_every_stretch() -> None:
    datasets, _ = take(Mixture(NAMES, SIZES, WEIGHTS, seed=3), 0, PERIOD)
    shares = np.stack([(datasets.reshape(-1, 256) == number).mean(1) for number in range(3)])
    np.testing.assert_allclose(
        shares, np.repeat([[1 / 6], [2.5 / 6], [2.5 / 6]], 256, axis=1), atol=0.012
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30), st.integers(64, 65_536))
def test_quotas_add_up_and_forget_nobody(weights: list[float], total: int) -> None:
    found = quotas(weights, total)
    assert found.sum() == total
    assert found.min() >= 1
    exact = np.array(weights) / sum(weights) * total
    assert (found - exact <= 1).all()


def test_counts_of_a_period_are_the_quotas() -> None:
    mixture = Mixture(["a", "b", "c", "d"], [7, 1000, 10, 99], [0.301, 0.5, 1e-9, 0.199], seed=3)
    for period in range(3):
        datasets, _ = take(mixture, period * PERIOD, PERIOD)
        counts = np.bincount(datasets)
        assert counts.sum() == PERIOD
        assert np.abs(counts - np.array([0.301, 0.5, 1e-9, 0.199]) * PERIOD).max() <= 1
        np.testing.assert_array_equal(counts, mixture.quotas)


def test_a_dataset_listed_twice_goes_on_instead_of_repeating() -> None:
    mixture = Mixture(["same", "other", "same"], [5000, 10, 5000], [1.0, 1.0, 3.0], seed=3)
    datasets, samples = take(mixture, 0, PERIOD)
    mine = samples[datasets != 1]
    epochs = mine[: len(mine) // 5000 * 5000].reshape(-1, 5000)
    assert len(epochs) > 5
    assert all(sorted(epoch) == list(range(5000)) for epoch in epochs), (
        "together they see each sample once an epoch"
    )
    first, second = samples[datasets == 0][:1000], samples[datasets == 2][:1000]
    assert not set(first[:500]) & set(second[:500])
    assert (datasets == 2).sum() == pytest.approx(3 * (datasets == 0).sum(), abs=2)


def test_counters_carry_over() -> None:
    whole = Mixture(["a", "b"], [50_000, 9000], [1.0, 1.0], seed=3)
    counters = whole.counters(PERIOD + 1000)
    later = Mixture(["b", "a"], [9000, 50_000], [3.0, 1.0], seed=3, before=counters)
    datasets, samples = take(later, 0, PERIOD)
    old, seen = take(whole, 0, PERIOD)
    _, more = take(whole, PERIOD, 1000)
    drawn = np.concatenate([seen[old == 0], more[take(whole, PERIOD, 1000)[0] == 0]])
    assert len(drawn) == counters["a"] == 33_268
    rest = samples[datasets == 1][: 50_000 - len(drawn)]
    assert not set(drawn) & set(rest), "nothing that was seen in this epoch comes again"
    assert later.counters(0) == {"b": counters["b"], "a": counters["a"]}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 70), st.integers(0, 2**62))
def test_blockwise_is_a_permutation(size: int, block: int, key: int) -> None:
    found = blockwise(np.arange(size), size, np.full(size, key, np.uint64), block)
    np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_blocks_stay_near_each_other_and_are_mixed() -> None:
    size, block = 100_003, 16
    found = samples_of(np.arange(2 * size), size, key_of(1, "x"), block)
    first, second = found[:size], found[size:]
    assert sorted(first) == sorted(second) == list(range(size))
    window = block * WINDOW_BLOCKS
    touched = [
        len(np.unique(first[start : start + window] // block))
        for start in range(0, size - window, window)
    ]
    assert max(touched) <= 2 * WINDOW_BLOCKS + 1, (
        "a window of the stream reads 64 runs of neighbours, cut at most once"
    )
    assert np.mean(np.abs(np.diff(first))) > size / 4, (
        "neighbours in the stream come from everywhere"
    )
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(np.argsort(first), np.argsort(second))[0, 1]) < 0.02, (
        "each epoch has an order of its own"
    )
