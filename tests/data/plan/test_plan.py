"""Plans: steps follow from the settings alone, from memory, disk or background alike."""

from pathlib import Path

import numpy as np
import pytest

from visionloom.data.plan import plan as planned
from visionloom.data.plan import plan_blocks as blocks
from visionloom.data.plan.deal import CostModel, PlannedPack
from visionloom.data.plan.lengths import LENGTHS
from visionloom.data.plan.parts import PART, Parts
from visionloom.data.plan.plan import MixtureEntry, Plan, Settings

SETTINGS = Settings(
    seed=1,
    phase="p",
    sequence_length=256,
    global_batch=6,
    patch_budget=300,
    packing_window_samples=64,
)


def parts(count: int, seed: int) -> Parts:
    """Odd samples are dropped, every tenth one is in two parts."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(count, LENGTHS)
    rows["tokens"] = rng.integers(5, 80, count)
    rows["patches"] = rng.integers(0, 30, count) * 4
    rows["supervised"], rows["patch_pairs"] = 3, rows["patches"].astype(np.int64) ** 2
    cut = np.arange(0, count, 10)
    special = np.zeros(2 * len(cut), PART)
    special["sample"], special["part_number"], special["tokens"] = (
        np.repeat(cut, 2),
        np.tile([0, 1], len(cut)),
        30,
    )
    return Parts(rows, np.union1d(np.arange(1, count, 2), cut), special)


def entry_of(
    name: str, count: int, weight: float = 1.0, content: str = "", over_length: str = "split"
) -> MixtureEntry:
    return MixtureEntry(
        name, weight, parts(count, len(name)), content or f"{name} {count}", over_length
    )


def plan(settings: Settings = SETTINGS, cache: Path | None = None) -> Plan:
    return Plan([entry_of("one", 900), entry_of("three", 300, 2.0)], settings, cache=cache)


def contents(packs: list[PlannedPack]) -> list[tuple[tuple[int, int, int], ...]]:
    return [pack.places for pack in packs]


def test_any_step_can_be_planned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned, "_PACKS_PER_BLOCK", 512)
    forward = plan()
    steps = [contents(forward.step(step)) for step in range(300)]
    state = forward.state(299)
    assert state["block"] >= 2, "the test must cross blocks"
    assert all(len(packs) == 6 for packs in steps)
    for step in (299, 0, 150):
        assert contents(plan().step(step)) == steps[step]
    resumed = plan()
    resumed.jump(state["block"], state["first_pack"])
    assert contents(resumed.step(299)) == steps[299]
    assert not resumed._blocks.holds(0), "blocks before the cursor need not be planned"


def test_packs_fit_both_budgets_and_use_views_only() -> None:
    made = plan()
    patches_of_fullest = 0
    for step in range(120):
        for pack in made.step(step):
            rows = [
                made.entries[number].parts.part(sample, excerpt)
                for number, sample, excerpt in pack.places
            ]
            assert sum(row.tokens for row in rows) <= 256
            patches = sum(row.patches for row in rows)
            assert patches <= 300
            patches_of_fullest = max(patches_of_fullest, patches)
            work = np.array(
                [
                    sum(row.tokens for row in rows),
                    sum(row.tokens**2 for row in rows),
                    patches,
                    sum(row.patch_pairs for row in rows),
                ]
            )
            assert pack.cost == pytest.approx(float(CostModel().of(work)))
            assert all(sample % 2 == 0 for _, sample, _ in pack.places)
    assert patches_of_fullest > 290, "the patch budget must bind in this test"


def test_every_view_once_an_epoch() -> None:
    made = Plan([entry_of("one", 512)], SETTINGS)
    drawn: list[tuple[int, int]] = []
    for number in range(4):
        block = made.block(number)
        drawn += [place[1:] for pack in range(len(block)) for place in block.places(pack)]
    assert made.draws_per_block % 512 == 0
    counts = {place: drawn.count(place) for place in set(drawn)}
    assert set(counts.values()) == {4 * made.draws_per_block // 512}
    expected = {
        (sample, excerpt)
        for sample in range(0, 512, 2)
        for excerpt in range(1 + (sample % 10 == 0))
    }
    assert set(counts) == expected


@pytest.mark.parametrize("unit", ["samples", "tokens"])
def test_weights_are_shares_of_usable_samples_or_of_tokens(unit: str) -> None:
    settings = Settings(
        **{**{name: getattr(SETTINGS, name) for name in SETTINGS.__slots__}, "weights_in": unit}
    )
    made = Plan([entry_of("one", 9000), entry_of("three", 3000, 2.0)], settings)
    served = {"samples": [0, 0], "tokens": [0, 0]}
    for number in range(8):
        block = made.block(number)
        for entry in range(2):
            mine = block.entries == entry
            served["samples"][entry] += int((mine & (block.part_numbers == 0)).sum())
            served["tokens"][entry] += int(block.tokens[mine].sum())
    assert served[unit][1] / served[unit][0] == pytest.approx(2.0, rel=0.02)


def test_shares_hold_at_every_step_up_to_the_window() -> None:
    made = Plan([entry_of("one", 9000), entry_of("three", 3000, 2.0)], SETTINGS)
    served = np.zeros(2)
    for step in range(200):
        for pack in made.step(step):
            for entry, _, part in pack.places:
                served[entry] += part == 0
        assert abs(served[1] - served.sum() * 2 / 3) <= SETTINGS.packing_window_samples
    assert served.sum() > 100 * SETTINGS.packing_window_samples


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"phase": "q"},
        {"sequence_length": 255},
        {"global_batch": 3},
        {"patch_budget": 299},
        {"packing_window_samples": 63},
        {"sample_token_multiple": 2},
        {"max_samples_per_pack": 9},
        {"shuffle_block_samples": 2},
        {"weights_in": "tokens"},
        {"tokenizer": "x"},
        {"media": "x"},
    ],
)
def test_the_hash_knows_every_setting(change: dict[str, int]) -> None:
    values = {name: getattr(SETTINGS, name) for name in SETTINGS.__slots__}
    assert set(values) >= set(change)
    assert plan(Settings(**{**values, **change})).hash != plan().hash


def test_the_hash_knows_every_source() -> None:
    known = {
        Plan([one, two], SETTINGS).hash
        for one, two in (
            (entry_of("one", 900), entry_of("three", 300, 2.0)),
            (entry_of("one", 900), entry_of("three", 300, 1.0)),
            (entry_of("one", 900), entry_of("three", 300, 2.0, content="y")),
            (entry_of("one", 900), entry_of("three", 300, 2.0, over_length="drop")),
            (entry_of("three", 300, 2.0), entry_of("one", 900)),
        )
    }
    assert len(known) == 5
    assert plan().hash in known


def test_blocks_are_shared_through_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [contents(plan().step(step)) for step in (0, 1, 80)]
    made = plan(cache=tmp_path)
    assert [contents(made.step(step)) for step in (0, 1, 80)] == expected
    made._blocks.get(1)
    files = sorted((tmp_path / "plan" / made.hash).iterdir())
    assert [file.name for file in files[:2]] == ["000000.npz", "000001.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "_make_block", lambda *_: pytest.fail("made although it is there"))
        shared = plan(cache=tmp_path)
        monkeypatch.setattr(shared._blocks, "ahead", lambda _: None)
        assert contents(shared.step(0)) == expected[0]
    files[0].write_bytes(files[0].read_bytes()[:1000])
    assert contents(plan(cache=tmp_path).step(0)) == expected[0], "a damaged file is made again"
    (tmp_path / "file").write_text("")
    assert contents(plan(cache=tmp_path / "file").step(0)) == expected[0], (
        "a folder that cannot be written is no fault"
    )


def test_old_blocks_leave_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ON_DISK", 3)
    made = plan(cache=tmp_path)
    expected = made.block(0).places(0)
    for number in range(1, 6):
        made.block(number)
    assert sorted(file.name for file in tmp_path.rglob("*.npz")) == [
        "000003.npz",
        "000004.npz",
        "000005.npz",
    ]
    assert made.block(0).places(0) == expected


def test_the_next_block_is_made_in_the_background() -> None:
    made = plan()
    made.step(0)
    assert made._blocks.holds(1)
    ahead = made._blocks.get(1)
    alone = plan()
    np.testing.assert_array_equal(blocks.PlanBlock.places(ahead, 3), alone.block(1).places(3))
