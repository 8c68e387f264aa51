"""Balance: dealing changes no pack, ranks get even work, every picture has one owner.

The simulation is on the plan's own packs, of mixtures like those of a run, with the operations of Qwen3-VL-8B.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloom.benchmarks.data.mixtures import MIXTURES
from visionloom.benchmarks.data.plan import plan_of, rank_costs
from visionloom.common.errors import UserError
from visionloom.data.plan.deal import PlannedPack, deal, deal_units


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (2, 1), (3, 2), (6, 2), (2, 6)])
def test_dealing_keeps_the_packs_and_balances(ranks: int, micro_batch: int) -> None:
    rng = np.random.default_rng(0)
    packs = [
        PlannedPack(((0, number, 0),), float(cost))
        for number, cost in enumerate(rng.lognormal(0, 0.5, 24))
    ]
    dealt = deal(packs, ranks, micro_batch)
    assert [len(micro) for rank in dealt for micro in rank] == [micro_batch] * (24 // micro_batch)
    assert sorted(pack.places[0][1] for rank in dealt for micro in rank for pack in micro) == list(
        range(24)
    )
    loads = [
        sum(pack.cost for pack in packs_of)
        for rank in dealt
        for packs_of in [[p for micro in rank for p in micro]]
    ]
    in_order = [sum(pack.cost for pack in packs[rank::ranks]) for rank in range(ranks)]
    assert max(loads) <= max(in_order)
    assert max(loads) / np.mean(loads) < 1.02
    for rank in dealt:
        costs = [sum(pack.cost for pack in micro) for micro in rank]
        assert costs == sorted(costs, reverse=True)


def test_uneven_dealing_is_refused() -> None:
    with pytest.raises(
        UserError,
        match="global_batch=4 packs cannot be dealt to 3 data-parallel ranks x micro_batch 1",
    ):
        deal([PlannedPack((), 1.0)] * 4, 3, 1)


@pytest.mark.parametrize(
    ("name", "ranks", "least", "worst"),
    [("8k", 64, 0.99, 1.01), ("32k", 64, 0.99, 1.01), ("256k", 16, 0.99, 1.03)],
)
def test_ranks_have_even_work(name: str, ranks: int, least: float, worst: float) -> None:
    plan = plan_of(MIXTURES[name], 30_000, 4 * ranks)
    loads = np.array([rank_costs(deal(plan.step(step), ranks, 1)) for step in range(8)])
    assert loads.mean(1).sum() / loads.max(1).sum() >= least
    in_order = np.array(
        [
            [sum(p.cost for p in plan.step(step)[rank::ranks]) for rank in range(ranks)]
            for step in range(8)
        ]
    )
    assert in_order.mean(1).sum() / in_order.max(1).sum() < least - 0.02, (
        "the test needs packs that are not alike"
    )
    assert (loads.max(1) / loads.mean(1)).max() <= worst


grids = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 20), st.integers(1, 20)), max_size=12)


@settings(max_examples=200, deadline=None)
@given(grids, st.integers(1, 9))
def test_units_are_the_pictures_in_order(shapes: list[tuple[int, int, int]], ranks: int) -> None:
    grid = np.array(shapes, np.int32).reshape(-1, 3)
    dealt = deal_units(grid, ranks)
    units, media, first, owner = dealt.units, dealt.media, dealt.first, dealt.owners
    assert {excerpt.dtype for excerpt in (units, media, first, owner)} == {np.dtype(np.int32)}
    assert (np.diff(media) >= 0).all()
    assert ((owner >= 0) & (owner < ranks)).all()
    for number, (time, height, width) in enumerate(shapes):
        mine = np.flatnonzero(media == number)
        assert 1 <= len(mine) <= ranks
        assert units[mine, 1:].tolist() == [[height, width]] * len(mine)
        assert units[mine, 0].min() >= 1
        assert first[mine].tolist() == np.cumsum([0, *units[mine, 0][:-1]]).tolist()
        assert units[mine, 0].sum() == time
    loads = np.bincount(owner, units.prod(1), ranks)
    if len(units):
        # a greedy deal, largest first, is never worse than the mean and the largest unit together
        assert loads.max() <= loads.sum() / ranks + units.prod(1).max()


def test_one_rank_has_everything_whole() -> None:
    grid = np.array([[1, 4, 6], [7, 2, 2]], np.int32)
    dealt = deal_units(grid, 1)
    units, media, first, owner = dealt.units, dealt.media, dealt.first, dealt.owners
    assert units.tolist() == grid.tolist()
    assert (media.tolist(), first.tolist(), owner.tolist()) == ([0, 1], [0, 0], [0, 0])


def test_a_long_video_is_shared_by_all() -> None:
    owner = deal_units(np.array([[64, 10, 10]], np.int32), 8).owners
    assert sorted(owner.tolist()) == list(range(8))
