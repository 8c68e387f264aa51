"""What is trained on follows what is drawn: at every step, of every dataset, its order up to a 40th of its epoch and a window.

The oracle is the definition: the dataset's order is written down draw by draw, what was trained on is ticked off in it one sample
after the other, and the gaps before the last tick are counted. It knows nothing of packs, windows or blocks.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from visionloom.data.plan import plan as planned
from visionloom.data.plan.cursor import Origin
from visionloom.data.plan.lengths import LENGTHS
from visionloom.data.plan.mixture import samples_of
from visionloom.data.plan.parts import PART, Parts
from visionloom.data.plan.plan import MixtureEntry, Plan, Settings

SETTINGS = Settings(
    seed=1,
    phase="",
    sequence_length=400,
    global_batch=1,
    patch_budget=500,
    packing_window_samples=64,
)


@dataclass(frozen=True)
class Made:
    """A dataset: how many samples, its weight, what share is in three parts and what share has no part."""

    size: int
    weight: float = 1.0
    cut: float = 0.0
    dropped: float = 0.0

    def entry(self, name: str, content: str) -> MixtureEntry:
        rng = np.random.default_rng(self.size)
        rows = np.zeros(self.size, LENGTHS)
        rows["tokens"], rows["patches"] = (
            rng.integers(5, 200, self.size),
            rng.integers(0, 50, self.size) * 4,
        )
        kind = rng.random(self.size)
        kind[0] = 1.0  # one sample at least is usable
        cut, dropped = (
            np.flatnonzero(kind < self.cut),
            np.flatnonzero((kind >= self.cut) & (kind < self.cut + self.dropped)),
        )
        excerpts = np.zeros(3 * len(cut), PART)
        excerpts["sample"], excerpts["part_number"] = (
            np.repeat(cut, 3),
            np.tile([0, 1, 2], len(cut)),
        )
        excerpts["tokens"] = rng.integers(5, 300, len(excerpts))
        return MixtureEntry(
            name, self.weight, Parts(rows, np.union1d(cut, dropped), excerpts), content, "split"
        )


def sources_of(mixture: list[Made], twice: bool = False) -> list[MixtureEntry]:
    """`twice`: the first dataset is listed a second time."""
    found = [made.entry(f"d{number}", f"content {number}") for number, made in enumerate(mixture)]
    return [*found, replace(found[0], name="again", weight=2.0)] if twice else found


class Ticks:
    """The order of one dataset from some draw on, and what was ticked off in it."""

    def __init__(self, plan: Plan, content: str, draws: int) -> None:
        entry = next(entry for entry in plan.entries if entry.content == content)
        self.before = plan.origin.draws.get(content, 0)
        key = plan.mixture._keys[plan.mixture.contents.index(content)]
        order = samples_of(
            np.arange(self.before, self.before + draws),
            entry.size,
            key,
            plan.settings.shuffle_block_samples,
        )
        parts = np.bincount(entry.parts.of(order)[1], minlength=draws)
        self.draws = np.flatnonzero(parts)
        """Those that have a part."""
        self.parts, self.got = parts[self.draws], np.zeros(len(self.draws), np.int64)
        self.places, self.turns = defaultdict[int, list[int]](list), Counter[tuple[int, int]]()
        for place, sample in enumerate(order[self.draws].tolist()):
            self.places[sample].append(place)
        self.epoch = entry.size - entry.parts.dropped
        self.most = min(int(self.epoch * 0.025), plan.settings.packing_window_samples)

    def tick(self, sample: int, excerpt: int) -> None:
        self.got[self.places[sample][self.turns[sample, excerpt]]] += 1
        self.turns[sample, excerpt] += 1

    @property
    def differing(self) -> int:
        """Places in which the ticked ones and as many from the front of the order differ."""
        ticked = self.got > 0
        front = np.arange(len(ticked)) < ticked.sum()
        return int(np.count_nonzero(ticked != front))

    def gaps(self, whole: bool, draws: int = 0) -> int:
        """Places not ticked before the last ticked one, or among the first `draws` draws; one in parts counts with its first or last."""
        ticked = self.got == self.parts if whole else self.got > 0
        stop = (
            int(np.searchsorted(self.draws, draws))
            if draws
            else int(np.flatnonzero(ticked).max(initial=-1)) + 1
        )
        assert not ticked[stop:].any(), "trained on, but not counted as drawn"
        return int(np.count_nonzero(~ticked[:stop]))


def follow(plan: Plan, steps: int) -> dict[str, Ticks]:
    """Train on the steps, with the gaps of every dataset checked after each."""
    found = {
        content: Ticks(plan, content, 4 * plan.draws_per_block) for content in plan.mixture.contents
    }
    for step in range(plan.origin.step, plan.origin.step + steps):
        for pack in plan.step(step):
            for entry, sample, excerpt in pack.places:
                found[plan.entries[entry].content].tick(sample, excerpt)
        for ticks in found.values():
            assert max(ticks.gaps(whole=True), ticks.gaps(whole=False)) <= ticks.most
            assert ticks.differing <= 0.05 * ticks.epoch
    return found


MIXTURE = st.lists(
    st.builds(
        Made,
        st.sampled_from([1, 2, 10, 19, 20, 60, 399, 997, 5000]),
        st.sampled_from([0.05, 1.0, 3.0, 20.0]),
        st.sampled_from([0.0, 0.3]),
        st.sampled_from([0.0, 0.5]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module", autouse=True)
def short_blocks() -> Iterator[None]:
    """Blocks of some 40 packs, so that short plans cross several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "_PACKS_PER_BLOCK", 40)
        yield


@examples(max_examples=60, deadline=None)
@given(
    MIXTURE,
    st.booleans(),
    st.sampled_from([1, 7, 64, 1024]),
    st.sampled_from([1, 16]),
    st.integers(1, 4),
    st.integers(1, 25),
    st.sampled_from(["samples", "tokens"]),
    st.sampled_from(["longer sequence", "other settings"]),
)
@example([Made(997, 3.0), Made(5000, 7.0)], False, 1024, 16, 4, 25, "samples", "longer sequence")
@example([Made(10, 1.0, 0.3), Made(5000, 1.0)], True, 1024, 1, 1, 25, "samples", "other settings")
def test_order_is_kept_up_to_a_40th_of_the_epoch_also_behind_a_change(
    mixture: list[Made],
    twice: bool,
    window: int,
    shuffle_block: int,
    batch: int,
    steps: int,
    unit: str,
    change: str,
) -> None:
    settings = replace(
        SETTINGS,
        packing_window_samples=window,
        shuffle_block_samples=shuffle_block,
        global_batch=batch,
        weights_in=unit,
    )
    before = Plan(sources_of(mixture, twice), settings)
    trained = follow(before, steps)
    state = json.loads(json.dumps(before.state(steps)))
    origin = Origin.after(state, 0 if change == "longer sequence" else steps)
    for content, ticks in trained.items():
        counted = origin.draws[content]
        assert ticks.gaps(whole=False, draws=counted) <= ticks.most, "passed over"
        assert ticks.gaps(whole=True, draws=counted) <= ticks.most + 1, (
            "besides, the rest of a sample in parts may be left"
        )
    if change == "longer sequence":
        after = Plan(
            sources_of(mixture, twice),
            replace(settings, sequence_length=800, patch_budget=900),
            origin=origin,
        )
    else:
        weighed = [replace(made, weight=1 / made.weight) for made in mixture]
        after = Plan(
            sources_of(weighed, twice),
            replace(settings, packing_window_samples=33, sample_token_multiple=4),
            origin=origin,
        )
    for content, ticks in follow(after, steps).items():
        assert ticks.before == origin.draws[content]
