"""A checkpoint has no layout: saved in one, continued in another, one more step ends where an uninterrupted run does.

Reference: one process that was never interrupted. And what can go wrong on disk: full, damaged, malicious.
"""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.model.sharding import canonical_parameters, cut
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.topology import Topology
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.disks import mounted
from visionloom.tests.train.layouts import Case, Layout, build, deal, packs_of
from visionloom.train.checkpoint import read as checkpoint
from visionloom.train.checkpoint.index import entries, read_index
from visionloom.train.checkpoint.untrusted import harmless_reading
from visionloom.train.checkpoint.write import Saver, estimated_bytes
from visionloom.train.config import CheckpointConfig
from visionloom.train.step import train_step

TOLERANCE = 1e-5
DENSE, MIXTURE = Case(content="images"), Case(content="images", experts=8)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "data 2": (2, {}),
    "tensor 2": (2, {"tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2, "pipeline_layout": "Et|tttL"}),
    "pipeline 2 virtual 2": (
        2,
        {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|tt|t|tL"},
    ),
    "context 2": (2, {"context": 2}),
    "tensor 2 pipeline 2": (4, {"tensor": 2, "pipeline": 2}),
    "expert 2": (2, {"expert": 2}),
    "tensor 2 expert tensor 2": (2, {"tensor": 2, "expert_tensor": 2}),
    "pipeline 2 expert 2": (4, {"pipeline": 2, "expert": 2}),
}
PAIRS = [
    *((DENSE, *pair) for pair in (
        ("one", "tensor 2"), ("one", "data 2"), ("data 2", "one"), ("tensor 2", "one"), ("tensor 2", "pipeline 2"),
        ("pipeline 2", "context 2"), ("pipeline 2 virtual 2", "tensor 2"), ("context 2", "pipeline 2 virtual 2"),
        ("tensor 2 pipeline 2", "data 2"),
    )),
    *((MIXTURE, *pair) for pair in (
        ("one", "expert 2"), ("expert 2", "one"), ("expert 2", "tensor 2 expert tensor 2"), ("tensor 2 expert tensor 2", "expert 2"),
        ("expert 2", "pipeline 2"), ("pipeline 2 expert 2", "tensor 2"),
    )),
]  # fmt: skip


def layout_of(name: str, case: Case) -> Layout:
    ranks, parallel = LAYOUTS[name]
    return Layout(ranks, parallel, case)


class Stream:
    """Stands in for the data of a phase, whose cursor these tests do not need."""

    datasets = (type("Dataset", (), {"name": "test"}),)

    def state(self, step: int) -> dict[str, Any]:
        return {"step": step}


def stage_of(layout: Layout) -> Any:
    stage = build(layout, sharded=True)
    for inner in stage.engine.optimizer.chained_optimizers:
        for group in inner.optimizer.param_groups:
            group["eps"] = 1e-3  # or noise in the last bits of tiny gradients would be a whole step
    return replace(stage, stream=Stream())


def train(stage: Any, layout: Layout, packs: list[TestPack], steps: int) -> None:
    mine = deal(packs, stage.topology, layout.one_encoder)
    for _ in range(steps):
        train_step(stage, mine)  # type: ignore[arg-type]
    # Tests read the weights, which the next forward pass would gather.
    stage.gather_weights()


def events_of(found: list[dict[str, Any]]) -> Any:
    return lambda event, **fields: found.append({"event": event, **fields})


def save(
    layout: Layout, packs: list[TestPack], folder: Path, background: bool = False
) -> list[dict[str, Any]]:
    """Two steps and a checkpoint, then one more step while it may still be written; runs on every rank of the pool."""
    stage, events = stage_of(layout), list[dict[str, Any]]()
    train(stage, layout, packs, 2)
    saver = Saver(folder, CheckpointConfig(asynchronous=background), events_of(events))
    saver.save(stage, 2, 2, last=not background)
    train(stage, layout, packs, 1)
    saver.finish(stage.topology)
    return events


def weights_of(stage: Any) -> dict[str, Tensor]:
    return {
        name: parameter.detach().clone()
        for chunk in stage.model_parts
        for name, parameter in canonical_parameters(chunk)
    }


def uninterrupted(layout: Layout, packs: list[TestPack], file: Path) -> list[dict[str, Tensor]]:
    """Weights after three steps; runs on every rank of the pool."""
    stage = stage_of(layout)
    train(stage, layout, packs, 3)
    if stage.topology.is_main:
        torch.save(weights_of(stage), file)
    return [weights_of(stage)]


def resumed(layout: Layout, packs: list[TestPack], folder: Path, optimizer: bool = True) -> Any:
    """A stage that went on from the newest checkpoint for one step."""
    stage = stage_of(layout)
    newest, damaged = checkpoint.newest(folder, stage.topology)
    assert newest is not None and not damaged
    if optimizer:
        checkpoint.load_trainer(newest, stage)
    else:
        checkpoint.load_weights(newest, stage.model_parts, stage.topology)
        stage.engine.optimizer.reload_model_params()
        stage.scheduler.step(2)
    train(stage, layout, packs, 1)
    return stage


def off(
    layout: Layout, packs: list[TestPack], folder: Path, file: Path, optimizer: bool = True
) -> float:
    """Largest relative error of a parameter after resuming; runs on every rank of the pool."""
    stage = resumed(layout, packs, folder, optimizer)
    expected: dict[str, Tensor] = torch.load(file)
    errors = []
    for chunk in stage.model_parts:
        for name, parameter in canonical_parameters(chunk):
            part = cut(name, expected[name], parameter, stage.topology)
            errors.append(float((parameter.detach() - part).norm() / part.norm()))
    return max(errors)


def bits(layout: Layout, packs: list[TestPack], folder: Path) -> dict[str, Tensor]:
    return weights_of(resumed(layout, packs, folder))


@pytest.fixture(scope="module")
def packs() -> list[TestPack]:
    return packs_of("images")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def saved(pool: RankPool, work: Path, packs: list[TestPack], case: Case, name: str) -> Path:
    """A run's folder with a checkpoint of the case in the layout, made once."""
    folder = work / f"{name} {case.experts}"
    if not folder.exists():
        layout = layout_of(name, case)
        pool.run(layout.ranks, save, layout, packs, folder)
    return folder


def reference_file(pool: RankPool, work: Path, packs: list[TestPack], case: Case) -> Path:
    file = work / f"reference {case.experts}.pt"
    if not file.exists():
        pool.run(1, uninterrupted, layout_of("one", case), packs, file)
    return file


QUICK = {
    ("tensor 2", "pipeline 2"),
    ("one", "expert 2"),
    ("expert 2", "one"),
    ("pipeline 2 virtual 2", "tensor 2"),
}


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        pytest.param(*pair, id=f"{'mixture' if pair[0].experts else 'dense'} {pair[1]} to {pair[2]}",
                     marks=() if pair[1:] in QUICK else pytest.mark.long)
        for pair in PAIRS
    ],
)  # fmt: skip
def test_any_layout_to_any_layout(
    case: Case, before: str, after: str, pool: RankPool, work: Path, packs: list[TestPack]
) -> None:
    folder, file = saved(pool, work, packs, case, before), reference_file(pool, work, packs, case)
    """Row 27 of the fault matrix: weights after one more step, which the optimizer's state decides too."""
    layout = layout_of(after, case)
    assert max(pool.run(layout.ranks, off, layout, packs, folder, file)) <= TOLERANCE


def save_again(layout: Layout, folder: Path, out: Path) -> None:
    """Load the newest checkpoint and save it at once; runs on every rank of the pool."""
    stage = stage_of(layout)
    newest, _ = checkpoint.newest(folder, stage.topology)
    assert newest is not None
    checkpoint.load_trainer(newest, stage)
    Saver(out, CheckpointConfig(asynchronous=False), events_of([])).save(stage, 2, 2, last=True)


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the one checkpoint of a run, as torch reads it."""
    from torch.distributed.checkpoint import FileSystemReader, load

    (step,) = (folder / "checkpoints" / "test").glob("step-*")
    described = dict(entries(read_index(step)))
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
    }
    load(found, storage_reader=FileSystemReader(step), no_dist=True)
    return found


@pytest.mark.parametrize(
    ("case", "before", "after"),
    [
        pytest.param(DENSE, "tensor 2", "pipeline 2", marks=pytest.mark.long),
        pytest.param(DENSE, "pipeline 2", "one", marks=pytest.mark.long),
        pytest.param(MIXTURE, "expert 2", "one", marks=pytest.mark.long),
    ],
    ids=["tensor to pipeline", "pipeline to one", "experts to one"],
)
def test_another_layout_holds_the_same_moments(
    case: Case,
    before: str,
    after: str,
    pool: RankPool,
    work: Path,
    packs: list[TestPack],
    tmp_path: Path,
) -> None:
    """Row 27 of the fault matrix: weights, master weights and both moments, bit for bit; reference: torch's own reader."""
    folder, layout = saved(pool, work, packs, case, before), layout_of(after, case)
    pool.run(layout.ranks, save_again, layout, folder, tmp_path)
    ours, theirs = tensors_in(tmp_path), tensors_in(folder)
    assert ours.keys() == theirs.keys() and sum("exp_avg" in name for name in ours) > 20
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_without_the_optimizers_state_it_is_found(
    pool: RankPool, work: Path, packs: list[TestPack]
) -> None:
    """The control: weights alone do not continue a run."""
    folder, file = (
        saved(pool, work, packs, DENSE, "tensor 2"),
        reference_file(pool, work, packs, DENSE),
    )
    assert (
        pool.run(1, off, layout_of("one", DENSE), packs, folder, file, False)[0] > 100 * TOLERANCE
    )


@pytest.mark.parametrize(
    "background",
    [
        pytest.param(False, id="waited for", marks=pytest.mark.long),
        pytest.param(True, id="in the background"),
    ],
)
@pytest.mark.parametrize(
    ("case", "name"), [(DENSE, "tensor 2"), (MIXTURE, "expert 2")], ids=["dense", "mixture"]
)
def test_the_same_layout_continues_bit_for_bit(
    case: Case, name: str, background: bool, pool: RankPool, tmp_path: Path, packs: list[TestPack]
) -> None:
    layout = layout_of(name, case)
    events = pool.run(layout.ranks, save, layout, packs, tmp_path / "run", background)
    assert [event["event"] for event in events[0]] == ["checkpoint"]
    assert 0 <= events[0][0]["stall_seconds"] <= events[0][0]["seconds"]
    expected = pool.run(layout.ranks, uninterrupted, layout, packs, tmp_path / "file")
    found = pool.run(layout.ranks, bits, layout, packs, tmp_path / "run")
    for (theirs,), ours in zip(expected, found, strict=True):
        assert theirs.keys() == ours.keys()
        assert [
            name for name, weight in theirs.items() if not torch.equal(weight, ours[name])
        ] == []


# ---- disks that fail


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MiB; a checkpoint of the tiny model takes some 10."""
    with mounted(tmp_path / "small", 40) as folder:
        yield folder


def save_until_full(
    layout: Layout, packs: list[TestPack], folder: Path, on_error: str
) -> tuple[list[dict[str, Any]], str]:
    stage, events = stage_of(layout), list[dict[str, Any]]()
    train(stage, layout, packs, 1)
    saver = Saver(
        folder, CheckpointConfig(asynchronous=False, keep=9, on_error=on_error), events_of(events)
    )
    try:
        for step in range(1, 8):
            saver.save(stage, step, step, last=False)
    except UserError as error:
        return events, str(error)
    return events, ""


@pytest.mark.parametrize(
    ("on_error", "failures"),
    [pytest.param("stop", 1, marks=pytest.mark.long), ("continue", 3)],
)
def test_a_full_disk_leaves_what_was_saved(
    on_error: str,
    failures: int,
    small_disk: Path,
    pool: RankPool,
    packs: list[TestPack],
    topology: Topology,
) -> None:
    """Row 19 of the fault matrix: what was saved is whole, `latest` names it, the cause has path and room."""
    layout = layout_of("data 2", DENSE)
    found = pool.run(2, save_until_full, layout, packs, small_disk / "run", on_error)
    (events, told), (others, same) = found
    assert told == same and [event["event"] for event in events] == [
        event["event"] for event in others
    ]
    whole = [event for event in events if event["event"] == "checkpoint"]
    failed = [event for event in events if event["event"] == "checkpoint_failed"]
    assert whole and len(failed) == failures
    assert all(
        "No space left" in event["cause"] and "MiB free" in event["cause"] for event in failed
    )
    assert "No space left" in told and "whole" in told and "\n" not in told
    newest, damaged = checkpoint.newest(small_disk / "run", topology)
    assert newest is not None and not damaged and str(newest.folder) == whole[-1]["folder"]
    assert not list((small_disk / "run").rglob("*.tmp"))


def room(layout: Layout, folder: Path) -> tuple[int, str]:
    from visionloom.train.checkpoint.write import check_room

    stage = stage_of(layout)
    try:
        check_room(folder, stage)
    except UserError as error:
        return estimated_bytes(stage), str(error)
    return estimated_bytes(stage), ""


def test_too_small_a_disk_is_refused_before_training(
    small_disk: Path, pool: RankPool, work: Path, packs: list[TestPack]
) -> None:
    """Row 22 of the fault matrix: the estimate of a first save, against the bytes of a real one."""
    folder = saved(pool, work, packs, DENSE, "tensor 2")
    (real,) = (
        sum(f.stat().st_size for f in step.iterdir())
        for step in (folder / "checkpoints" / "test").glob("step-*")
    )
    filler = small_disk / "filler"
    filler.write_bytes(bytes(36 << 20))
    found = pool.run(2, room, layout_of("tensor 2", DENSE), small_disk / "run")
    for estimate, told in found:
        assert abs(estimate / real - 1) < 0.05, (estimate, real)
        assert "MiB free, a checkpoint needs" in told and "run.folder" in told


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, pool: RankPool) -> None:
    """Row 21 of the fault matrix, where the phase's folder is the one that cannot be made."""
    (tmp_path / "checkpoints").write_text("a file")
    ((_, told),) = pool.run(1, room, layout_of("one", DENSE), tmp_path)
    assert "cannot be written" in told and "run.folder" in told


def fail_second(layout: Layout, packs: list[TestPack], folder: Path) -> list[dict[str, Any]]:
    """A save in which only rank 1 has an error."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    stage, events = stage_of(layout), list[dict[str, Any]]()
    train(stage, layout, packs, 1)
    original = FileSystemWriterAsync.write_preloaded_data
    if stage.topology.rank == 1:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(
            lambda *a: (0, OSError(28, "No space left on device", "x"))
        )
    try:
        Saver(folder, CheckpointConfig(asynchronous=False), events_of(events)).save(
            stage, 1, 1, last=False
        )
    finally:
        FileSystemWriterAsync.write_preloaded_data = original
    return events


def test_one_rank_that_fails_fails_the_save(
    tmp_path: Path, pool: RankPool, packs: list[TestPack]
) -> None:
    """Row 20 of the fault matrix: no space for one writer only is no checkpoint."""
    found = pool.run(2, fail_second, layout_of("data 2", DENSE), packs, tmp_path)
    for (event,) in found:
        assert event["event"] == "checkpoint_failed" and "No space left" in event["cause"]
    assert not list(tmp_path.rglob("step-*")) and not (tmp_path / "checkpoints" / "latest").exists()


class Crash(BaseException):
    """Stands for the moment of a SIGKILL: nothing catches it."""


def crash(layout: Layout, packs: list[TestPack], folder: Path, moment: str) -> None:
    """A whole checkpoint, and one more whose commit ends at a moment; runs on a rank of the pool."""
    stage = stage_of(layout)
    train(stage, layout, packs, 1)
    saver = Saver(folder, CheckpointConfig(), events_of([]))
    saver.save(stage, 1, 1, last=True)
    try:
        with patch(moment, side_effect=Crash):
            saver.save(stage, 2, 2, last=True)
    except Crash:
        return


@pytest.mark.parametrize(
    ("moment", "resumed_at"),
    [("pathlib.Path.rename", 1), ("os.replace", 2)],
    ids=["before rename", "before latest"],
)
def test_a_commit_cut_short(
    moment: str,
    resumed_at: int,
    tmp_path: Path,
    pool: RankPool,
    packs: list[TestPack],
    topology: Topology,
) -> None:
    """Row 4 of the fault matrix: before the rename there is no checkpoint; after it there is one, whatever `latest` says.

    Leftovers go with the next save, or when a run starts.
    """
    layout = layout_of("one", DENSE)
    pool.run(1, crash, layout, packs, tmp_path, moment)
    newest, damaged = checkpoint.newest(tmp_path, topology)
    assert newest is not None and not damaged and newest.run_state.step == resumed_at
    assert (tmp_path / "checkpoints" / "latest").read_text() == "test/step-00000001\n"
    pool.run(1, save, layout, packs, tmp_path)
    assert not list(tmp_path.rglob("step-*.tmp"))
    newest, damaged = checkpoint.newest(tmp_path, topology)
    assert newest is not None and newest.run_state.step == 2


# ---- damaged and malicious files


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    (step,) = (target / "checkpoints" / "test").glob("step-*")
    return step


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "metadata", "manifest"])
def test_damage_is_found_and_named(
    damage: str,
    tmp_path: Path,
    pool: RankPool,
    work: Path,
    packs: list[TestPack],
    topology: Topology,
) -> None:
    """Rows 23 and 24 of the fault matrix: a flipped bit, a short and a missing shard, no index, no manifest."""
    run = tmp_path / "run"
    step = copy_of(saved(pool, work, packs, DENSE, "tensor 2"), run)
    older = step.with_name("step-00000001")
    shutil.copytree(step, older)
    shard = step / "__1_0.distcp"
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        {"remove": shard, "metadata": step / ".metadata", "manifest": step / "manifest.json"}[
            damage
        ].unlink()
    newest, damaged = checkpoint.newest(run, topology)
    assert newest is not None and newest.folder == older
    (line,) = damaged
    named = {"metadata": ".metadata", "manifest": "manifest.json"}.get(damage, shard.name)
    assert str(step) in line and named in line


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def reads(folder: Path, topology: Topology) -> str:
    layout = layout_of("one", DENSE)
    stage = stage_of(layout)
    try:
        checkpoint.load_weights(checkpoint.read(folder), stage.model_parts, stage.topology)
    except UserError as error:
        return str(error)
    return ""


def read_in_pool(folder: Path) -> str:
    return reads(folder, topologies.start(ParallelConfig(), torch.device("cpu")))


def test_a_malicious_index_is_refused_without_being_run(
    tmp_path: Path, pool: RankPool, work: Path, packs: list[TestPack]
) -> None:
    """Row 25 of the fault matrix, `.metadata`."""
    step = copy_of(saved(pool, work, packs, DENSE, "one"), tmp_path / "run")
    assert pool.run(1, read_in_pool, step) == [""]
    (step / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    (told,) = pool.run(1, read_in_pool, step)
    assert "pathlib.Path.touch" in told or "getattr" in told
    assert str(step) in told and not (tmp_path / "ran").exists()


def test_a_malicious_entry_is_refused_without_being_run(
    tmp_path: Path, pool: RankPool, work: Path, packs: list[TestPack]
) -> None:
    """Row 25 of the fault matrix: the entry for plain data, which torch would unpickle, holds code."""
    step = copy_of(saved(pool, work, packs, DENSE, "one"), tmp_path / "run")
    with (step / ".metadata").open("rb") as file:
        index = pickle.load(file)
    (entry,) = (
        info for place, info in index.storage_data.items() if place.fqn.startswith("common_state")
    )
    shard = step / entry.relative_path
    evil = tmp_path / "evil.pt"
    torch.save([Touch(tmp_path / "ran")], evil)
    entry.offset, entry.length = shard.stat().st_size, evil.stat().st_size
    shard.write_bytes(shard.read_bytes() + evil.read_bytes())
    (step / ".metadata").write_bytes(pickle.dumps(index))
    (told,) = pool.run(1, read_in_pool, step)
    assert told and str(step) in told and not (tmp_path / "ran").exists()


def test_plain_files_are_read_as_ever(tmp_path: Path) -> None:
    """The control: what is refused inside runs outside."""
    evil = tmp_path / "evil.pt"
    torch.save([Touch(tmp_path / "ran")], evil)
    with pytest.raises(UserError), harmless_reading(tmp_path):
        torch.load(evil)
    assert not (tmp_path / "ran").exists()
    torch.load(evil, weights_only=False)
    assert (tmp_path / "ran").exists()


def spoil(layout: Layout, packs: list[TestPack], folder: Path) -> None:
    """A checkpoint whose weights have a NaN in the part of the last rank."""
    stage = stage_of(layout)
    if stage.topology.rank == stage.topology.world_size - 1:
        with torch.no_grad():
            next(chunk for chunk in stage.model_parts).get_parameter(
                "language_model.decoder.final_layernorm.weight"
            )[0] = float("nan")
    Saver(folder, CheckpointConfig(asynchronous=False), events_of([])).save(stage, 1, 1, last=True)


def refused(layout: Layout, folder: Path, optimizer: bool) -> str:
    stage = stage_of(layout)
    newest, damaged = checkpoint.newest(folder, stage.topology)
    assert newest is not None and not damaged
    with pytest.raises(UserError) as raised:
        if optimizer:
            checkpoint.load_trainer(newest, stage)
        else:
            checkpoint.load_weights(newest, stage.model_parts, stage.topology)
    return str(raised.value)


def test_weights_that_are_no_numbers_are_named_on_all_ranks(
    tmp_path: Path, pool: RankPool, packs: list[TestPack]
) -> None:
    """One NaN, which only the last pipeline stage reads."""
    layout = layout_of("pipeline 2", DENSE)
    pool.run(2, spoil, layout, packs, tmp_path)
    for optimizer in (True, False):
        one, other = pool.run(2, refused, layout, tmp_path, optimizer)
        assert (
            one == other
            and "final_layernorm.weight" in one
            and "NaN or infinite" in one
            and "\n" not in one
        )


def verified(folder: Path) -> str:
    topology = topologies.start(ParallelConfig(), torch.device("cpu"))
    with pytest.raises(UserError) as raised:
        checkpoint.whole(folder, "init.checkpoint", topology)
    return str(raised.value)


def test_what_a_run_begins_with_is_verified_too(
    tmp_path: Path, pool: RankPool, work: Path, packs: list[TestPack]
) -> None:
    step = copy_of(saved(pool, work, packs, DENSE, "one"), tmp_path / "run")
    content = bytearray((step / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (step / "__0_0.distcp").write_bytes(content)
    told = f"init.checkpoint={step} is damaged: __0_0.distcp was changed after it was written: name another one"
    assert pool.run(2, verified, step) == [told, told]


def test_what_is_kept(tmp_path: Path, pool: RankPool, packs: list[TestPack]) -> None:
    """Nothing but checkpoints goes, and what has another name is in nobody's way."""
    phase = tmp_path / "checkpoints" / "test"
    for other in ("step-", "step-0000000x", "step-1"):
        (phase / other).mkdir(parents=True)
    (phase / "step-00000000").write_text("a file")
    pool.run(1, save_many, layout_of("one", DENSE), packs, tmp_path)
    there, others = (
        {entry.name for entry in phase.iterdir()},
        {"step-", "step-00000000", "step-0000000x", "step-1"},
    )
    assert there >= others
    kept = sorted(there - others)
    assert kept == ["step-00000004", "step-00000008", "step-00000009", "step-00000010"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "test/step-00000010\n"
    state = json.loads(
        (tmp_path / "checkpoints" / "test" / "step-00000010" / "state.json").read_text()
    )
    assert (state["step"], state["phase_step"], state["updates"], state["data"]) == (
        10,
        10,
        1,
        {"step": 10},
    )


def save_many(layout: Layout, packs: list[TestPack], folder: Path) -> None:
    stage = stage_of(layout)
    train(stage, layout, packs, 1)
    saver = Saver(folder, CheckpointConfig(keep=2, keep_every_steps=4), events_of([]))
    for step in range(1, 11):
        saver.save(stage, step, step, last=step == 10)
