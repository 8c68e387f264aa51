"""Where a stream stands: resumed at any step by any layout, the same packs come; after a change, nothing comes twice."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig, DatasetConfig
from visionloom.data.plan import plan as planned
from visionloom.data.plan.cursor import STATE_BYTES, Origin
from visionloom.data.plan.deal import deal
from visionloom.data.plan.lengths import LENGTHS
from visionloom.data.plan.open import StreamOptions
from visionloom.data.plan.parts import PART, Parts
from visionloom.data.plan.plan import MixtureEntry, Plan, Settings
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.train_stream import PackStream
from visionloom.parallel.share import ALONE, Share
from visionloom.tests.data.batches import digest
from visionloom.tests.data.samples import essay, film, picture_question

LENGTH = 256


@pytest.fixture
def data(config: Callable[..., DataConfig]) -> DataConfig:
    made = config(
        pictures=[
            picture_question(number, (32, 32 * (1 + number % 3)), number % 7)
            for number in range(97)
        ],
        films=[film(number, 2 + number % 4) for number in range(23)],
        texts=[essay(number, number % 40 if number % 11 else 300) for number in range(53)],
    )
    made.datasets["texts"].over_length = "split"
    made.shuffle_block_samples = 4
    return made


def stream(data: DataConfig, **changes: object) -> PackStream:
    values: dict[str, object] = {
        "phase_name": "p",
        "sequence_length": LENGTH,
        "global_batch": 24,
        "mixture": {"pictures": 4, "films": 1, "texts": 1},
        "loss": "sqrt",
        "seed": 7,
    }
    return PackStream(StreamOptions(data, **{**values, **changes}))  # type: ignore[arg-type]


def step_of(made: PackStream, step: int, ranks: int) -> list[str]:
    """The packs of a step, put together from all ranks."""
    return sorted(
        digest([batch])
        for rank in range(ranks)
        for batch in made.micro_batches(step, Share(rank, ranks), 1)
    )


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of some 70 packs, so that a test crosses many."""
    monkeypatch.setattr(planned, "_PACKS_PER_BLOCK", 64)


def test_a_chain_of_restarts_on_other_layouts_gives_the_same_packs(
    data: DataConfig, short_blocks: None
) -> None:
    whole = stream(data)
    expected = [step_of(whole, step, 1) for step in range(24)]
    assert whole.state(23)["block"] >= 2, "the chain must cross blocks"
    state = json.loads(json.dumps(whole.state(0)))
    for ranks, steps in ((8, range(5)), (4, range(5, 11)), (6, range(11, 18)), (8, range(18, 24))):
        made = stream(data)
        made.load_state(state)
        for step in steps:
            assert step_of(made, step, ranks) == expected[step]
        state = json.loads(json.dumps(made.state(steps.stop)))
        assert state == whole.state(steps.stop), "the state is the same whatever the layout"


def test_a_plan_resumes_at_each_of_200_steps(data: DataConfig, short_blocks: None) -> None:
    whole = stream(data, global_batch=6).plan
    steps = [[pack.places for pack in whole.step(step)] for step in range(201)]
    middle = 0
    for step in range(200):
        state = json.loads(json.dumps(whole.state(step)))
        middle += step * 6 != state["first_pack"]
        made = Plan(whole.entries, whole.settings, origin=Origin.of(state))
        assert made.hash == state["plan_hash"]
        made.jump(state["block"], state["first_pack"])
        assert [[pack.places for pack in made.step(at)] for at in (step, step + 1)] == steps[
            step : step + 2
        ]
        assert made.state(step) == state
    assert whole.state(200)["block"] >= 10
    assert middle > 180, "nearly all of them in the middle of a block"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_sample_once_an_epoch_over_all_ranks(data: DataConfig, ranks: int) -> None:
    made = stream(data, mixture={"texts": 1}).plan
    draws = 2 * made.draws_per_block
    assert draws // 53 >= 2
    assert draws % 53, "the last epoch goes on in the next block"
    blocks = [made.block(number) for number in range(2)]
    steps, left = divmod(sum(map(len, blocks)), 24)
    served = [
        pack
        for step in range(steps)
        for rank in deal(made.step(step), ranks, 1)
        for micro in rank
        for pack in micro
    ]
    drawn = Counter(place[1:] for pack in served for place in pack.places)
    for pack in range(len(blocks[1]) - left, len(blocks[1])):
        drawn.update(place[1:] for place in blocks[1].places(pack))
    parts, _ = made.entries[0].parts.of(np.arange(53))
    assert len(parts) > 53, "some documents are in parts"
    assert set(drawn) == {(int(row["sample"]), int(row["part_number"])) for row in parts}
    assert set(drawn.values()) == {draws // 53, draws // 53 + 1}
    assert sum(count for (_, excerpt), count in drawn.items() if excerpt == 0) == draws


def lengths_only(
    tokens: int, sizes: list[int], settings: dict[str, object], origin: Origin | None = None
) -> Plan:
    """A plan of datasets without pictures."""
    entries = []
    for number, size in enumerate(sizes):
        rows = np.zeros(size, LENGTHS)
        rows["tokens"] = np.random.default_rng(number).integers(10, 300, size)
        over = np.flatnonzero(rows["tokens"] > tokens)
        name = f"a_long_name_of_dataset_{number}"
        content = hashlib.sha256(name.encode()).hexdigest()[:16]
        entries.append(
            MixtureEntry(
                name, 0.123 + number, Parts(rows, over, np.empty(0, PART)), content, "truncate_tail"
            )
        )
    values = {
        "seed": 1,
        "phase": "",
        "sequence_length": tokens,
        "global_batch": 4,
        "patch_budget": 900,
        "packing_window_samples": 64,
        "shuffle_block_samples": 16,
    }
    return Plan(entries, Settings(**{**values, **settings}), origin=origin)  # type: ignore[arg-type]


def test_the_state_is_small_with_twenty_datasets() -> None:
    before = {
        hashlib.sha256(f"a_long_name_of_dataset_{n}".encode()).hexdigest()[:16]: 10**9 + n
        for n in range(20)
    }
    plan = lengths_only(
        4096,
        [500] * 20,
        {"tokenizer": "12345678", "media": "12345678", "phase": "long_context"},
        Origin(123_456, before),
    )
    state = plan.state(123_456 + 150)
    assert len(json.dumps(state, separators=(",", ":"))) <= STATE_BYTES
    assert len(json.dumps(state)) <= STATE_BYTES


def seen(plan: Plan, steps: range) -> list[int]:
    """Samples of the first dataset in these steps."""
    return [
        sample
        for step in steps
        for pack in plan.step(step)
        for entry, sample, _ in pack.places
        if entry == 0
    ]


def test_phases_of_growing_length_go_on_in_the_same_epoch() -> None:
    size, drawn, state = 30_000, list[int](), None
    for tokens, steps in ((128, 60), (256, 70), (512, 50)):
        plan = lengths_only(tokens, [size], {}, Origin.after(state, 0) if state else None)
        drawn += seen(plan, range(steps))
        state = json.loads(json.dumps(plan.state(steps)))
    assert len(drawn) == len(set(drawn)), "a sample that was seen in this epoch comes again"
    assert state is not None
    (count,) = state["draws"].values()
    assert len(drawn) < count < size
    unrelated = lengths_only(512, [size], {"phase": "other"})
    assert set(seen(unrelated, range(50))) & set(drawn), (
        "the test needs phases that would repeat without the counters"
    )


def test_after_a_change_of_settings_nothing_comes_twice() -> None:
    before = lengths_only(256, [20_000, 500], {"seed": 5})
    state = json.loads(json.dumps(before.state(70)))
    after = lengths_only(
        256,
        [20_000, 500],
        {"seed": 5, "packing_window_samples": 128, "patch_budget": 800},
        Origin.after(state, 70),
    )
    early, late = seen(before, range(70)), seen(after, range(70, 140))
    assert min(len(early), len(late)) > 40
    assert not set(early) & set(late)


def test_a_changed_stream_is_refused_or_goes_on_behind_what_was_drawn(data: DataConfig) -> None:
    made = stream(data, mixture={"pictures": 4, "films": 1}, global_batch=2)
    state = json.loads(json.dumps(made.state(5)))
    with pytest.raises(
        UserError, match=r"weight of dataset films was 1\.0, now 3\.0.*data\.on_change=new_phase"
    ):
        stream(data, mixture={"pictures": 4, "films": 3}, global_batch=2).load_state(state)
    data.on_change = "new_phase"
    changed = stream(data, mixture={"pictures": 4, "films": 3}, global_batch=2)
    assert changed.load_state(state) == ["weight of dataset films was 1.0, now 3.0"]
    assert changed.plan.origin == Origin.after(state, 5)
    contents = {entry.content: entry.name for entry in changed.plan.entries}
    assert {
        contents[content]: count for content, count in changed.plan.origin.draws.items()
    } == state["draws"]
    assert len(step_of(changed, 5, 2)) == 2
    again = json.loads(json.dumps(changed.state(7)))
    resumed = stream(data, mixture={"pictures": 4, "films": 3}, global_batch=2)
    assert resumed.load_state(again) == []
    assert step_of(resumed, 7, 1) == step_of(changed, 7, 1)
    with pytest.raises(ValueError, match="begins at step 5"):
        resumed.micro_batches(4, ALONE, 2)


def test_the_same_dataset_listed_twice_never_repeats(data: DataConfig) -> None:
    again = data.datasets["pictures"]
    data.datasets["once_more"] = DatasetConfig(again.path, over_length="drop")
    made = stream(data, mixture={"pictures": 1, "once_more": 1}, global_batch=1).plan
    first = [place for step in range(8) for pack in made.step(step) for place in pack.places]
    assert {entry for entry, _, _ in first} == {0, 1}
    ordinals = made.mixture.draws(0, 97).samples
    assert sorted(ordinals) == list(range(97))


def test_a_plan_of_an_older_program_goes_on_as_a_new_phase(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(planned, "PLAN_VERSION", 3)
        state = json.loads(json.dumps(stream(data).state(5)))
    with pytest.raises(
        UserError,
        match=r"this program's way of planning was 3, now 4.*go on with data\.on_change=new_phase",
    ):
        stream(data).load_state(state)
    data.on_change = "new_phase"
    changed = stream(data)
    assert changed.load_state(state) == ["this program's way of planning was 3, now 4"]
    assert changed.plan.origin == Origin.after(state, 5)


def test_a_state_with_the_old_names_of_options_goes_on(data: DataConfig) -> None:
    """Reference: the state of a stream, renamed and hashed as programs before 2026-11-26 did."""
    data.sample_token_multiple, data.max_samples_per_pack = 2, 5
    made = stream(data)
    expected, state = step_of(made, 5, 1), json.loads(json.dumps(made.state(5)))
    names = {"window": "packing_window_samples", "multiple": "sample_token_multiple",
        "most": "max_samples_per_pack", "block": "shuffle_block_samples", "draws_per_segment": "draws_per_block"}  # fmt: skip
    old = {today: name for name, today in names.items()}
    facts = {old.get(name, name): value for name, value in state["plan"].items()}
    hashed = hashlib.sha256(json.dumps([facts, 0, []]).encode()).hexdigest()[:32]
    before = state | {"version": 2, "segment": state["block"], "plan": facts, "plan_hash": hashed}
    del before["block"]
    assert old.keys().isdisjoint(facts) and hashed != state["plan_hash"]

    resumed = stream(data)
    assert resumed.load_state(before) == []
    assert step_of(resumed, 5, 1) == expected and resumed.state(5) == state
    data.packing_window_samples = 32
    with pytest.raises(
        UserError, match=r"with: data\.packing_window_samples was 64, now 32: restore it"
    ):
        stream(data).load_state(before)


def test_a_state_is_of_this_version(data: DataConfig) -> None:
    with pytest.raises(UserError, match="version 99"):
        stream(data).load_state({**stream(data).state(2), "version": 99})


def batches(made: PackStream, steps: range) -> Iterator[PackedBatch]:
    for step in steps:
        yield from made.micro_batches(step, ALONE, 6)


def test_segments_are_padded_to_a_multiple_for_context_parallelism(data: DataConfig) -> None:
    data.sample_token_multiple = 16
    for batch in batches(stream(data), range(3)):
        borders = batch.cu_seqlens.numpy()
        assert (borders % 16 == 0).all()
        real = batch.segment_datasets.numpy() >= 0
        for start, stop in zip(borders[:-1][real], borders[1:][real], strict=True):
            padding = batch.padding_mask[start:stop].numpy()
            length = int((~padding).sum())
            assert stop - start == -(-length // 16) * 16
            assert not padding[:length].any(), "padding comes after the sample's tokens"
            assert (batch.labels[start + length : stop] == -100).all()
            assert not batch.loss_weights[start + length : stop].any()
    data.sample_token_multiple, data.max_samples_per_pack = 1, 3
    assert (
        max(
            int((batch.segment_datasets >= 0).sum())
            for batch in batches(stream(data, global_batch=6), range(3))
        )
        <= 18
    )
