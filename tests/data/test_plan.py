"""Plans: steps follow from the settings alone, and dealing them out balances without changing them."""

import numpy as np
import pytest

from visionloom.data.lengths import LENGTHS
from visionloom.data.plan import Pack, Plan, Settings, Source, deal
from visionloom.parallel.errors import UserError

SETTINGS = Settings(seed=1, phase="p", sequence_length=256, global_batch=6, patch_budget=300, window=64)


def source(name: str, count: int, weight: float = 1.0, identity: str = "x") -> Source:
    rng = np.random.default_rng(len(name))
    rows = np.zeros(count, LENGTHS)
    rows["tokens"] = rng.integers(5, 80, count)
    rows["patches"] = rng.integers(0, 30, count) * 4
    rows["supervised"], rows["patch_squares"] = 3, rows["patches"].astype(np.int64) ** 2
    return Source(name, weight, np.arange(0, count, 2), rows, identity)


def plan(settings: Settings = SETTINGS) -> Plan:
    return Plan([source("one", 900), source("three", 300, 2.0)], settings)


def contents(packs: list[Pack]) -> list[list[tuple[int, int]]]:
    return [pack.places for pack in packs]


def test_any_step_can_be_planned_first() -> None:
    forward = plan()
    steps = [contents(forward.step(step)) for step in range(300)]
    assert forward.cursor(299)["segment"] >= 2, "the test must cross segments"
    assert all(len(packs) == 6 for packs in steps)
    for step in (299, 0, 150):
        assert contents(plan().step(step)) == steps[step]
    cursor = forward.cursor(299)
    resumed = plan()
    resumed.jump(cursor["segment"], cursor["first_pack"])
    assert contents(resumed.step(299)) == steps[299]
    assert list(resumed._segments) == [cursor["segment"]], "segments before the cursor need not be planned"


def test_draws_before_a_step_are_counted() -> None:
    made = plan()
    count = {"one": 0, "three": 0}
    for step in range(250):
        if step % 83 == 0:
            assert made.draws_before(step) == count
        for pack in made.step(step):
            count["one"] += pack.sources.count(0)
            count["three"] += pack.sources.count(1)


def test_packs_fit_both_budgets_and_use_kept_samples_only() -> None:
    made = plan()
    patches_of_fullest = 0
    for step in range(120):
        for pack in made.step(step):
            rows = [made.sources[number].lengths[sample] for number, sample in pack.places]
            assert sum(int(row["tokens"]) for row in rows) <= 256
            patches = sum(int(row["patches"]) for row in rows)
            assert patches <= 300
            patches_of_fullest = max(patches_of_fullest, patches)
            assert all(sample % 2 == 0 for sample in pack.samples)
    assert patches_of_fullest > 290, "the patch budget must bind in this test"


def test_every_sample_once_an_epoch() -> None:
    made = Plan([source("one", 512)], SETTINGS)
    drawn: list[int] = []
    for segment in range(4):
        packs = made._segment(segment).packs
        drawn += [sample for pack in packs for sample in pack.samples]
    counts = np.bincount(drawn, minlength=512)[::2]
    assert made.draws_per_segment % 256 == 0
    assert (counts == len(drawn) // 256).all()


@pytest.mark.parametrize(
    "change",
    [{"seed": 2}, {"phase": "q"}, {"sequence_length": 255}, {"global_batch": 3}, {"patch_budget": 299}, {"window": 63}],
)
def test_the_hash_knows_every_setting(change: dict[str, int]) -> None:
    values = {name: getattr(SETTINGS, name) for name in SETTINGS.__slots__}
    assert plan(Settings(**{**values, **change})).hash != plan().hash


def test_the_hash_knows_every_source() -> None:
    known = {
        Plan([one, two], SETTINGS).hash
        for one, two in (
            (source("one", 900), source("three", 300, 2.0)),
            (source("one", 900), source("three", 300, 1.0)),
            (source("one", 900), source("three", 300, 2.0, identity="y")),
            (source("three", 300, 2.0), source("one", 900)),
            (source("one", 900), source("three", 302, 2.0)),
        )
    }
    assert len(known) == 5
    assert plan().hash in known


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (2, 1), (3, 2), (6, 2), (2, 6)])
def test_dealing_keeps_the_packs_and_balances(ranks: int, micro_batch: int) -> None:
    rng = np.random.default_rng(0)
    packs = [Pack((0,), (number,), float(cost)) for number, cost in enumerate(rng.lognormal(0, 0.5, 24))]
    dealt = deal(packs, ranks, micro_batch)
    assert [len(micro) for rank in dealt for micro in rank] == [micro_batch] * (24 // micro_batch)
    assert sorted(pack.samples for rank in dealt for micro in rank for pack in micro) == [(number,) for number in range(24)]
    loads = [sum(pack.cost for micro in rank for pack in micro) for rank in dealt]
    in_order = [sum(pack.cost for pack in packs[rank::ranks]) for rank in range(ranks)]
    assert max(loads) <= max(in_order)
    assert max(loads) / np.mean(loads) < 1.03
    for rank in dealt:
        costs = [sum(pack.cost for pack in micro) for micro in rank]
        assert costs == sorted(costs, reverse=True)


def test_uneven_dealing_is_refused() -> None:
    with pytest.raises(UserError, match="global_batch=4 packs cannot be dealt to 3 data-parallel ranks x micro_batch 1"):
        deal([Pack((), (), 1.0)] * 4, 3, 1)
