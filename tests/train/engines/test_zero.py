"""DeepSpeed's ZeRO as the engine of real runs. Reference: the same runs on Megatron-core's, step for step."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch

from visionloom.launch.configure import compose
from visionloom.launch.data import main as data_command
from visionloom.model import vision
from visionloom.parallel.config import ParallelConfig, ZeroConfig
from visionloom.parallel.divided import shape_of
from visionloom.tests.model.reference import TestPack
from visionloom.tests.ranks import RankPool
from visionloom.tests.train.faulty import pretrain_with
from visionloom.tests.train.layouts import Layout, deal, packs_of
from visionloom.tests.train.layouts import build as build_stage
from visionloom.tests.train.runs import metrics, run_config, run_words
from visionloom.tests.train.test_early_end import exact, stopped
from visionloom.tests.train.test_layouts import train
from visionloom.tests.train.test_overlap import only_one_sees
from visionloom.tests.train.test_resume import SECONDS, checkpoint_tensors, kill_a_rank, start
from visionloom.train.config import RunConfig
from visionloom.train.step import train_step

STEPS = 20
STAGES = {
    "1": ["stage=1"],
    "2 offloaded": ["stage=2", "offload_optimizer=cpu"],
    "3": ["stage=3"],
    "3 offloaded": [
        *("stage=3", "offload_optimizer=cpu", "offload_parameters=cpu"),
        "bucket_bytes=65536",
    ],
}
RunAs = Callable[..., Path]
"""Runs a model with words of its own on some ranks and returns its folder; each once for the file."""


def words_of(stage: str) -> list[str]:
    return ["parallel.engine=deepspeed", *(f"parallel.zero.{word}" for word in STAGES[stage])]


def agree(ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    """Losses, norms, rates and data of two runs."""
    for own, other in zip(exact(ours), exact(theirs), strict=True):
        step, loss, by_source, norm, *rest = own
        assert loss == pytest.approx(other[1], rel=tolerance), step
        assert by_source == pytest.approx(other[2], rel=tolerance), step
        assert norm == pytest.approx(other[3], rel=tolerance), step
        assert rest == other[4:]


def weights_agree(pool: RankPool, ours: Path, theirs: Path, tolerance: float = 1e-5) -> None:
    """All tensors of the last checkpoints: weights, master copies and moments."""
    own, other = (pool.run(1, checkpoint_tensors, each)[0] for each in (ours, theirs))
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        error = (tensor - other[name]).norm() / other[name].norm().clamp_min(1e-12)
        assert error <= tolerance, (name, float(error))


def count_anew() -> None:
    """Let DeepSpeed number parameters and modules from 0: some ranks of the pool have had models before, and others none."""
    from deepspeed import zero
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    (count,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    count[0] = zero.Init.param_id = 0


def stopped_anew(config: RunConfig, ranks: list[int], step: int) -> str:
    """As `stopped`, on a rank of the pool."""
    count_anew()
    return stopped(config, ranks, step)


@pytest.fixture(scope="module")
def run_as(pool: RankPool, demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunAs:
    known: dict[tuple[Any, ...], Path] = {}

    def once(ranks: int, *words: str) -> Path:
        if (ranks, *words) not in known:
            folder = tmp_path_factory.mktemp("run")
            config = run_config(demo_data, folder, STEPS, ranks, *words)
            assert pool.run(ranks, stopped_anew, config, [], 0) == ["done"] * ranks
            known[(ranks, *words)] = folder
        return known[(ranks, *words)]

    return once


def all_but(*quick: str) -> list[Any]:
    """All stages; those that are not quick are left to make proofs."""
    marks = {name: () if name in quick else pytest.mark.long for name in STAGES}
    return [pytest.param(name, marks=marks[name]) for name in STAGES]


@pytest.mark.parametrize("stage", all_but("3"))
def test_steps_are_megatrons(stage: str, run_as: RunAs, pool: RankPool) -> None:
    """Packs of text and pictures, dealt to two ranks."""
    ours, theirs = run_as(2, *words_of(stage)), run_as(2)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["3 offloaded"])
@pytest.mark.parametrize(
    "words",
    [
        # Slower: a token that goes to another expert by a rounding parts two runs for good.
        ["model=tiny_moe", "phases.multimodal.lr=5e-4"],
        ["phases.multimodal.trainable=[merger]", "parallel.recompute=full"],
        ["model.text.tie_embeddings=false", "parallel.recompute=mlp"],
    ],
    ids=["a mixture", "frozen groups and recomputation", "an output matrix of its own"],
)
def test_other_models_and_phases(
    words: list[str], stage: str, run_as: RunAs, pool: RankPool
) -> None:
    ours, theirs = run_as(2, *words, *words_of(stage)), run_as(2, *words)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["3"])
def test_tensor_ranks(stage: str, run_as: RunAs, pool: RankPool) -> None:
    words = ["parallel.tensor=2", "parallel.sequence=false"]
    ours, theirs = run_as(4, *words, *words_of(stage)), run_as(4, *words)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["3 offloaded"])
def test_adapters(stage: str, run_as: RunAs, pool: RankPool) -> None:
    """With mergers that train whole; the weights under the adapters are in no checkpoint."""
    (base,) = (run_as(2) / "checkpoints" / "multimodal").iterdir()
    words = [
        f"init.checkpoint={base}",
        "lora.rank=4",
        "lora.groups=[language]",
        "lora.full=[merger]",
    ]
    ours, theirs = run_as(2, *words, *words_of(stage)), run_as(2, *words)
    agree(ours, theirs)
    weights_agree(pool, ours, theirs)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["1"])
def test_bf16(stage: str, run_as: RunAs, pool: RankPool, demo_data: Path, tmp_path: Path) -> None:
    """As near to Megatron-core's as two runs in bf16 are, see tests/train/test_bf16.py, and resumed bit for bit."""
    words = ["run.precision=bf16", *words_of(stage)]
    agree(run_as(2, *words), run_as(2, "run.precision=bf16"), 0.01)
    config = run_config(demo_data, tmp_path, STEPS, 2, *words)
    pool.run(2, stopped_anew, config, [1], 5)
    pool.run(2, train, config)
    assert exact(tmp_path) == exact(run_as(2, *words))


@pytest.mark.long
@pytest.mark.parametrize("stage", ["3"])
def test_from_megatron_and_back(
    stage: str, run_as: RunAs, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """In the middle of a phase, with moments and count of updates, and on other numbers of ranks."""
    small = "phases.multimodal.micro_batch=1"
    parts = ((1, [], 3), (2, words_of(stage), 6), (4, words_of(stage), 8), (2, [], 0))
    for ranks, words, step in parts:
        config = run_config(demo_data, tmp_path, STEPS, ranks, small, *words)
        pool.run(ranks, stopped_anew, config, [0] if step else [], step)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [4, 7, 9]
    agree(tmp_path, run_as(2, small))
    weights_agree(pool, tmp_path, run_as(2, small))


@pytest.mark.long
@pytest.mark.parametrize("stage", ["3 offloaded"])
def test_a_killed_rank_costs_nothing(
    stage: str, run_as: RunAs, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """SIGKILL of a rank under torchrun; reference: the run that was not killed, bit for bit."""
    words = [*words_of(stage), "checkpoint.every_steps=5"]
    command = run_words(demo_data, tmp_path, STEPS, *words)
    first = start(command)
    kill_a_rank(first, tmp_path, 8, 1)
    assert first.wait(SECONDS) != 0
    output, _ = (second := start(command)).communicate(timeout=SECONDS)
    assert second.returncode == 0, output
    assert exact(tmp_path) == exact(run_as(2, *words))
    ours, whole = (pool.run(1, checkpoint_tensors, at)[0] for at in (tmp_path, run_as(2, *words)))
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["2 offloaded", "3 offloaded"])
def test_a_bad_step_changes_nothing(
    stage: str, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    """Infinite weights in the third step on one rank."""
    for name, words in (("ours", words_of(stage)), ("theirs", [])):
        config = run_config(demo_data, tmp_path / name, 6, 2, *words)
        pool.run(2, pretrain_with, config, "nan", 3, 3, 1)
    lines = metrics(tmp_path / "ours")
    assert [line["skipped"] for line in lines] == [False, False, True, False, False, False]
    for line, other in zip(lines, metrics(tmp_path / "theirs"), strict=True):
        if not line["skipped"]:
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    weights_agree(pool, tmp_path / "ours", tmp_path / "theirs")


def three_steps(layout: Layout, packs: list[TestPack]) -> list[tuple[float, float]]:
    """Losses and norms; runs on every rank of the pool."""
    count_anew()
    stage = build_stage(layout, sharded=True)
    # So that the rank with pictures has several pieces.
    with mock.patch.object(vision, "PIECE_PATCHES", 16):
        results = [train_step(stage, deal(packs, stage.topology, False)) for _ in range(3)]  # type: ignore[arg-type]
    stage.engine.close()
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("case", ["plain", "many pieces"])
def test_pictures_on_one_rank_only(case: str, pool: RankPool) -> None:
    """The other one's layers are called as often, for their weights are gathered and their gradients reduced all the same."""
    packs = only_one_sees(packs_of("everything"))
    again = {"recompute": "full"} if case == "many pieces" else {}
    zero = {"engine": "deepspeed", "zero": ZeroConfig(stage=3)}
    ours, theirs = (
        pool.run(2, three_steps, Layout(2, again | parallel), packs)[0] for parallel in (zero, {})
    )
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, rel=1e-5)


def bytes_of_a_rank(data: Path, folder: Path, ranks: int, words: list[str]) -> int:
    """Bytes of weights, master copies and moments that a rank holds for good (runs in the pool)."""
    from visionloom.parallel import topology as topologies
    from visionloom.train import build
    from visionloom.train.engines.engine import WEIGHT

    config = run_config(data, folder, 4, ranks, "phases.multimodal.micro_batch=1", *words)
    topology = build.open_topology(config)
    stream = build.build_stream(config, "multimodal", folder, topology)
    parts = build.build_model(config, topology, drawn=True)
    trainer = build.build_trainer(config, "multimodal", topology, parts, stream)
    held = sum(
        tensor.nbytes for owned in trainer.engine.owned() for tensor in owned.values.values()
    )
    if WEIGHT not in next(iter(trainer.engine.owned())).values:
        held += sum(parameter.nbytes for parameter in parts[0].parameters())
    # Nothing else is whole: what is left of a weight's memory is a placeholder.
    whole = sum(
        parameter.untyped_storage().nbytes()
        for parameter in parts[0].parameters()
        if not getattr(parameter, "ds_persist", False)
    )
    assert trainer.engine.has_whole_weights or whole <= 64 * len(list(parts[0].parameters()))
    trainer.engine.close()
    topologies.stop()
    return held


def test_memory_falls_as_one_over_the_ranks(
    pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    sizes = {
        ranks: max(pool.run(ranks, bytes_of_a_rank, demo_data, tmp_path, ranks, words_of("3")))
        for ranks in (1, 2, 4)
    }
    # Norms and biases do not divide evenly.
    assert sizes[2] == pytest.approx(sizes[1] / 2, rel=0.02)
    assert sizes[4] == pytest.approx(sizes[1] / 4, rel=0.02)


WIDE = (
    "layers=10",
    "hidden_size=1024",
    "head_dim=256",
    "mrope_section=[44,42,42]",
    "ffn_hidden_size=2048",
)


def memory_of_building(config: RunConfig) -> tuple[int, list[int]]:
    """Bytes that a rank takes at most while a model is built with its first weights, and of each of these (runs in the pool)."""
    from visionloom.parallel import topology as topologies
    from visionloom.train import build

    count_anew()
    topology = build.open_topology(config)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = psutil.Process().memory_info().rss
    with build.as_the_engine_wants(config, "multimodal", topology):
        parts = build.first_weights(config, topology)
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    sizes = [shape_of(parameter).numel() * 4 for parameter in parts[0].parameters()]
    del parts
    topologies.stop()
    return peak - before, sizes


@pytest.mark.long
def test_no_rank_ever_has_the_model_whole(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the kernel's count of memory, of processes that give back what they free."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    own_pool = RankPool(own_environment=True)
    words = ["phases.multimodal.micro_batch=1", *(f"model.text.{word}" for word in WIDE)]
    config = run_config(demo_data, tmp_path, 9, 4, *words, *words_of("3"))
    taken = own_pool.run(4, memory_of_building, config)
    own_pool.close()
    for peak, sizes in taken:
        # A quarter for good, and one matrix with the numbers that are drawn for it; 30 MB are for the rest.
        assert sum(sizes) / 4 < peak < sum(sizes) / 4 + 3 * max(sizes) + 30e6 < sum(sizes) / 2


def exported(trained: Path, out: Path) -> None:
    """Runs in the pool."""
    from visionloom.parallel import topology as topologies
    from visionloom.train.exchange.export_huggingface import ExportOptions, export_checkpoint

    topology = topologies.start(ParallelConfig(), torch.device("cpu"))
    export_checkpoint(trained, out, ExportOptions(), topology, print)
    topologies.stop()


@pytest.mark.long
def test_weights_of_a_hugging_face_folder(
    run_as: RunAs, pool: RankPool, demo_data: Path, tmp_path: Path
) -> None:
    (trained,) = (run_as(2) / "checkpoints" / "multimodal").iterdir()
    pool.run(1, exported, trained, tmp_path / "hf")
    # Slower, since the moments begin anew on weights that are trained.
    words = [f"init.huggingface={tmp_path / 'hf'}", "phases.multimodal.lr=5e-4"]
    agree(run_as(2, *words, *words_of("3")), run_as(2, *words))


@pytest.mark.long
def test_the_demo_and_adapters_under_torchrun(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All phases of the demo, its evaluations and answers, then the recipe of adapters on its weights."""
    monkeypatch.setenv("VISIONLOOM_DEMO_DATA", str(demo_data))
    monkeypatch.setenv("VISIONLOOM_DEMO_TASK", str(tmp_path / "task"))
    assert data_command(["demo-task", str(tmp_path / "task"), "--scale", "0.02"]) == 0
    # Without rewards: two steps a phase make no answer right.
    engine = ["parallel.engine=deepspeed", "optim=adamw", "~phases.rl"]
    phases = compose(["+recipe=demo", "~phases.rl"], 2).phases  # type: ignore[union-attr]
    short = [f"phases.{name}.{word}" for name in phases for word in ("steps=2", "warmup_steps=0")]
    few = ["evaluation.phase_answers=1", "evaluation.phase_samples=1", "evaluation.samples=1"]
    demo = start(["+recipe=demo", f"run.folder={tmp_path / 'demo'}", *engine, *short, *few])
    output, _ = demo.communicate(timeout=2 * SECONDS)
    assert demo.returncode == 0, output
    last = tmp_path / f"demo/checkpoints/reasoning/step-{2 * len(phases):08d}"
    words = [f"run.folder={tmp_path / 'lora'}", f"init.checkpoint={last}"]
    words += ["phases.words.steps=3", "phases.words.warmup_steps=0"]
    tuned = start(["+recipe=lora/demo", *words, *engine[:2], "evaluation.samples=1"])
    output, _ = tuned.communicate(timeout=2 * SECONDS)
    assert tuned.returncode == 0, output
    assert len(metrics(tmp_path / "lora")) == 3


@pytest.mark.parametrize("size", ["2b", "4b", "8b", "32b", "30b_a3b", "235b_a22b"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_layouts_are_for_all_models(size: str, kind: str) -> None:
    for layout in ("zero3", "zero3_offload"):
        words = [f"+recipe={kind}/qwen3vl_{size}", "init.huggingface=/hf", f"parallel={layout}"]
        config = compose(words, 8)
        assert config is not None and config.parallel.zero.stage == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["parallel.pipeline=2"], "leave out parallel.pipeline, or choose parallel.engine=megatron"),
        (["parallel.context=2"], "leave out parallel.context"),
        (["parallel.zero.offload_optimizer=nvme"], "needs parallel.zero.nvme_path"),
        (["parallel.zero.stage=2", "parallel.zero.offload_parameters=cpu"], "needs parallel.zero.stage=3"),
        (["optim=muon"], "choose optim.name=adamw"),
        (["model=tiny_moe", "parallel.tensor=2"], "does not cut a mixture of experts"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_one_line(
    words: list[str], said: str, demo_data: Path, tmp_path: Path
) -> None:
    from visionloom.common.errors import UserError

    with pytest.raises(UserError, match=said):
        compose([*run_words(demo_data, tmp_path, 1), "parallel.engine=deepspeed", *words], 2)


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from visionloom.common.errors import UserError
    from visionloom.train.engines.zero import import_deepspeed

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'visionloom\[deepspeed\]'"):
        import_deepspeed(torch.device("cpu"))
