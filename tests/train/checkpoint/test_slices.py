"""Each rank saves and loads its own slices: bytes, memory, collectives, and the files of before.

References: Megatron-core's own state of full tensors, torch's reader, and what the kernel counts.
"""

import ctypes
import gc
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import default_planner

from visionloom.model.config import ModelConfig
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.checkpoint.test_checkpoint import (
    DENSE,
    LAYOUTS,
    MIXTURE,
    events_of,
    layout_of,
    save_again,
    saved,
    stage_of,
    tensors_in,
)
from visionloom.tests.train.layouts import Case, Layout, TestPack, packs_of
from visionloom.train.checkpoint import planning
from visionloom.train.checkpoint.planning import PhasePlanner
from visionloom.train.checkpoint.weights_state import layout_metadata, weights_state
from visionloom.train.checkpoint.write import Saver
from visionloom.train.config import CheckpointConfig
from visionloom.train.phase.trainer import PhaseTrainer


@pytest.fixture(scope="module")
def packs() -> list[TestPack]:
    return packs_of("images")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slices")


# ---- any layout


MORE: dict[str, tuple[int, dict[str, Any]]] = LAYOUTS | {
    "data 3": (3, {}),
    "data 4": (4, {}),
    "tensor 2 data 2": (4, {"tensor": 2}),
    "expert 2 data 2": (4, {"expert": 2}),
    "tensor 2 over experts": (2, {"tensor": 2, "expert_tensor": 1}),
}


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(DENSE, "data 3", marks=pytest.mark.long),
        (MIXTURE, "expert 2 data 2"),
        pytest.param(DENSE, "data 4", marks=pytest.mark.long),
        pytest.param(DENSE, "tensor 2 data 2", marks=pytest.mark.long),
        pytest.param(MIXTURE, "data 3", marks=pytest.mark.long),
        pytest.param(MIXTURE, "tensor 2 data 2", marks=pytest.mark.long),
        pytest.param(MIXTURE, "tensor 2 over experts", marks=pytest.mark.long),
    ],
    ids=lambda value: value if isinstance(value, str) else "mixture" if value.experts else "dense",
)
def test_slices_are_the_same_tensors(
    case: Case, name: str, pool: RankPool, work: Path, packs: list[TestPack], tmp_path: Path
) -> None:
    """Loaded by ranks whose slices end within rows, and saved by them: bit for bit, as torch's own reader sees it."""
    whole = saved(pool, work, packs, case, "one")
    ranks, parallel = MORE[name]
    pool.run(ranks, save_again, Layout(ranks, parallel, case), whole, tmp_path)
    ours, theirs = tensors_in(tmp_path), tensors_in(whole)
    assert ours.keys() == theirs.keys()
    assert sum("exp_avg" in name for name in ours) > 20
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


# ---- the files of before


def whole_state(trainer: PhaseTrainer) -> dict[str, Any]:
    """The state as earlier versions saved it: Megatron-core gathers full tensors of the optimizer on every rank."""
    weights = weights_state(trainer.model_parts, trainer.topology)
    tensors = {}
    for number, inner in enumerate(trainer.engine.optimizer.chained_optimizers):
        inner.optimizer.make_moments()
        metadata = layout_metadata(trainer.topology)
        tensors[str(number)] = inner.sharded_param_state_fully_reshardable(weights, False, metadata)
    return {**weights, "optimizer": tensors}


def save_as_before(layout: Layout, folder: Path, out: Path) -> None:
    # Earlier versions had one bucket; of several Megatron-core gathers other tensors.
    layout = replace(layout, parallel=layout.parallel | {"overlap": False})
    with patch.object(planning, "trainer_state", whole_state):
        save_again(layout, folder, out)


@pytest.mark.parametrize(
    ("case", "name"),
    [(DENSE, "data 2"), pytest.param(MIXTURE, "expert 2", marks=pytest.mark.long)],
    ids=["dense", "mixture"],
)
def test_checkpoints_of_full_tensors_are_read(
    case: Case, name: str, pool: RankPool, work: Path, packs: list[TestPack], tmp_path: Path
) -> None:
    whole, layout = saved(pool, work, packs, case, "one"), layout_of(name, case)
    before, after = tmp_path / "before", tmp_path / "after"
    pool.run(layout.ranks, save_as_before, layout, whole, before)
    pool.run(layout.ranks, save_again, layout, before, after)
    expected = tensors_in(whole)
    for folder in (before, after):
        found = tensors_in(folder)
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# ---- bytes and memory


@dataclass(frozen=True)
class LargerCase(Case):
    """With 12.6 million weights more, so that a rank's state is far above the noise of its memory."""

    @property
    def model(self) -> ModelConfig:
        config = super().model
        return replace(config, text=replace(config.text, ffn_hidden_size=16_384))


def staged_bytes(layout: Layout, folder: Path) -> tuple[int, int]:
    """Bytes of weights and of the optimizer that a rank stages; runs on every rank of the pool."""
    _, buckets = PhasePlanner(stage_of(layout)).plan(folder, copied=True)
    weights = optimizer = 0
    for _, _, (_, tensors) in buckets:
        for item, tensor in tensors:
            # What torch.save writes.
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            if item.index.fqn.startswith("optimizer."):
                optimizer += tensor.nbytes
            else:
                weights += tensor.nbytes
    return weights, optimizer


def test_a_rank_stages_its_share(pool: RankPool, tmp_path: Path) -> None:
    """On 1, 2 and 4 ranks: together the whole state, each its share of it, up to the padding of buffers."""
    ((weights, optimizer),) = pool.run(1, staged_bytes, Layout(1, {}, DENSE), tmp_path)
    assert optimizer == 3 * weights > 1_000_000
    for ranks in (2, 4):
        shares = pool.run(ranks, staged_bytes, Layout(ranks, {}, DENSE), tmp_path)
        assert sum(share for share, _ in shares) == weights
        assert sum(share for _, share in shares) == optimizer
        assert max(share for _, share in shares) < optimizer / ranks + 10_000
        assert max(share for share, _ in shares) < 1.3 * weights / ranks


def memory(name: str) -> int:
    """Bytes of this process, by a name of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(name)


def peak_of_a_save(layout: Layout, folder: Path, as_before: bool) -> tuple[int, int]:
    """Bytes of host memory that a save takes at its peak, and of this rank's own state; runs on every rank of the pool."""
    stage = stage_of(layout)
    own = 0
    for inner in stage.engine.optimizer.chained_optimizers:
        inner.optimizer.make_moments()
        moments = [each for values in inner.optimizer.state.values() for each in values.values()]
        for moment in moments:
            moment.fill_(1.0)  # zeros that nobody has written take no memory
        for group in inner.optimizer.param_groups:
            own += sum(3 * parameter.nbytes for parameter in group["params"])
    for part in stage.model_parts:
        own += sum(parameter.nbytes for parameter in part.parameters()) // layout.ranks

    saver = Saver(folder, CheckpointConfig(asynchronous=True), events_of([]))
    # The next forward pass would do so anyway; gloo takes memory for it that is soon free again.
    stage.gather_weights()
    # Memory that the pool has freed before and not given back would be taken again, which no peak shows.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = memory("RssAnon")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = memory("VmHWM")
    with patch.object(
        planning, "trainer_state", whole_state if as_before else planning.trainer_state
    ):
        saver.save(stage, 1, 1, last=False)
    saver.finish(stage.topology)
    # Of mapped files nothing new is read: what grows is anonymous.
    assert start >= before
    return memory("VmHWM") - start, own


def test_a_save_takes_no_more_memory_than_the_ranks_own_state(
    pool: RankPool, tmp_path: Path
) -> None:
    """And as Megatron-core saves it, the control, it takes more than twice as much."""
    layout = Layout(2, {}, LargerCase())
    pool.run(2, peak_of_a_save, layout, tmp_path / "warm", False)  # imports, pools of threads
    for peak, own in pool.run(2, peak_of_a_save, layout, tmp_path / "slices", False):
        assert own > 90 << 20
        assert peak < 1.2 * own, (peak, own)
    for peak, own in pool.run(2, peak_of_a_save, layout, tmp_path / "before", True):
        assert peak > 2 * own, (peak, own)


# ---- planning once


@contextmanager
def gathered(sizes: list[int]) -> Iterator[None]:
    """Note the bytes of each object that this rank gives to others."""
    whole, to_one = dist.all_gather_object, dist.gather_object

    def note_all(objects: Any, each: Any, *rest: Any, **named: Any) -> None:
        sizes.append(len(pickle.dumps(each)))
        whole(objects, each, *rest, **named)

    # torch itself calls it by name.
    def note_one(*rest: Any, **named: Any) -> None:
        sizes.append(len(pickle.dumps(named["obj"] if "obj" in named else rest[0])))
        to_one(*rest, **named)

    with (
        patch.object(dist, "all_gather_object", note_all),
        patch.object(dist, "gather_object", note_one),
    ):
        yield


def plan_twice(layout: Layout, folder: Path) -> tuple[list[int], list[int], bool]:
    """Bytes gathered by the first and the second plan of a phase, and whether they are the same; on every rank of the pool."""
    planner = PhasePlanner(stage_of(layout))
    counts: list[list[int]] = [[], []]
    described = []
    for sizes in counts:
        # torch's comparison of parts, which takes too long for many.
        slow = patch.object(default_planner, "_validate_global_plan", side_effect=AssertionError)
        with gathered(sizes), slow:
            plan, buckets = planner.plan(folder, copied=True)
        items = [item for _, _, (_, tensors) in buckets for item, _ in tensors]
        described.append((items, plan.metadata is not None, buckets[0][0]))
    first, second = counts
    return first, second, described[0] == described[1]


@pytest.mark.parametrize("name", ["data 2", "tensor 2"])
def test_only_the_first_save_of_a_phase_gathers_what_ranks_write(
    name: str, pool: RankPool, tmp_path: Path
) -> None:
    for first, second, same in pool.run(2, plan_twice, layout_of(name, DENSE), tmp_path):
        assert max(first) > 10_000 and second == [] and same


def save_two_trainers(layout: Layout, other: Layout, folder: Path) -> list[list[int]]:
    """Bytes gathered by two saves of each of two trainers; runs on every rank of the pool."""
    counts: list[list[int]] = []
    saver = Saver(folder, CheckpointConfig(asynchronous=False), events_of([]))
    for each in (layout, other):
        stage = stage_of(each)
        for _ in range(2):
            counts.append([])
            with gathered(counts[-1]):
                saver.save(stage, len(counts), len(counts), last=True)
    return counts


@pytest.mark.parametrize(
    "other",
    [
        Layout(2, {}, replace(DENSE, trainable=("merger",))),
        pytest.param(layout_of("tensor 2", DENSE), marks=pytest.mark.long),
    ],
    ids=["trainable", "layout"],
)
def test_another_trainer_is_planned_anew(other: Layout, pool: RankPool, tmp_path: Path) -> None:
    """One that trains less, or is cut otherwise: a save compares the index with what was written."""
    found = pool.run(2, save_two_trainers, layout_of("data 2", DENSE), other, tmp_path)
    for first, second, third, fourth in found:
        # A copy of the model on both ranks shares out nothing: a gathering less.
        assert len(first) >= len(third) > len(second) == len(fourth)
        assert not set(third) <= set(second)


def save_without_a_slice(layout: Layout, folder: Path) -> list[dict[str, Any]]:
    """A save for which the last rank forgets the first of its slices; runs on every rank of the pool."""
    stage, events = stage_of(layout), list[dict[str, Any]]()
    original = planning.trainer_state

    def less(trainer: PhaseTrainer) -> dict[str, Any]:
        state = original(trainer)
        if trainer.topology.rank == 1:
            state["optimizer"].pop(next(iter(state["optimizer"])))
        return state

    with patch.object(planning, "trainer_state", less):
        settings = CheckpointConfig(asynchronous=False)
        Saver(folder, settings, events_of(events)).save(stage, 1, 1, last=False)
    return events


def test_a_missing_slice_is_no_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    for (event,) in pool.run(2, save_without_a_slice, layout_of("data 2", DENSE), tmp_path):
        assert event["event"] == "checkpoint_failed"
        assert "do not make it up" in event["cause"] and "optimizer.state" in event["cause"]
    assert not list(tmp_path.rglob("step-*"))
